"""From a tile program to a shared library: lowering, compilers, host launcher, manifest, command line."""
