"""What every Hayflick service does the same way: serve, refuse, configure, translate."""
