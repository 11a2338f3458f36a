"""The merge3 daemon: a thin gRPC face over LocalEngine. It has no merging or scoring logic of its own."""
