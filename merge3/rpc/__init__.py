"""The wire: messages and stubs generated from proto/merge3/v1 at build time; convert.py and statuses.py translate."""
