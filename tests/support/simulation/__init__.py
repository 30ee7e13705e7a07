"""The real controller in one process and one thread, in a world whose time, logger and nodes a test holds."""
