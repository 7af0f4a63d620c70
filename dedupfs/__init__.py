"""dedupfs: a FUSE filesystem that fronts a directory of photographs and stores every picture once."""

__version__ = "0.1.0"
