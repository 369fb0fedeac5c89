"""livemove: moves a running stateful network service between Linux hosts while its clients stay connected."""

__version__ = "0.1.0"
