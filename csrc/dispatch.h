// The only switches from run-time modes to template arguments. Each returns false for a value it
// does not know; callers turn that into MERGE3_UNSUPPORTED.
#pragma once
#include "include/merge3/merge.h"

namespace merge3 {

template <int N>
struct Constant {
  static constexpr int value = N;
};

template <class Body>
bool dispatch_experts(int experts, const Body& body) {
  switch (experts) {
    case 1: body(Constant<1>()); return true;
    case 2: body(Constant<2>()); return true;
    case 3: body(Constant<3>()); return true;
    case 4: body(Constant<4>()); return true;
    case 5: body(Constant<5>()); return true;
    case 6: body(Constant<6>()); return true;
    case 7: body(Constant<7>()); return true;
    case 8: body(Constant<8>()); return true;
    default: return false;
  }
}

template <class Body>
bool dispatch_sparsify(int sparsify, const Body& body) {
  switch (sparsify) {
    case MERGE3_KEEP_ALL: body(Constant<MERGE3_KEEP_ALL>()); return true;
    case MERGE3_KEEP_MAGNITUDE: body(Constant<MERGE3_KEEP_MAGNITUDE>()); return true;
    case MERGE3_KEEP_RANDOM: body(Constant<MERGE3_KEEP_RANDOM>()); return true;
    case MERGE3_KEEP_RANKED: body(Constant<MERGE3_KEEP_RANKED>()); return true;
    case MERGE3_KEEP_BAND: body(Constant<MERGE3_KEEP_BAND>()); return true;
    default: return false;
  }
}

template <class Body>
bool dispatch_elect(int elect, const Body& body) {
  switch (elect) {
    case MERGE3_ELECT_NONE: body(Constant<MERGE3_ELECT_NONE>()); return true;
    case MERGE3_ELECT_SUM: body(Constant<MERGE3_ELECT_SUM>()); return true;
    case MERGE3_ELECT_COUNT: body(Constant<MERGE3_ELECT_COUNT>()); return true;
    default: return false;
  }
}

}  // namespace merge3
