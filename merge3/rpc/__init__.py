"""The wire: messages and stubs generated from proto/merge3/v1 at build time, and convert.py between them and our objects."""
