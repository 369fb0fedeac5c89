"""What livemove tells: result objects (``result``), text for people (``text``), progress (``terminal``), ``docs``."""
