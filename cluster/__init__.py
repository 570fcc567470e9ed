"""The cluster library: brings up filer nodes and joins them.  Nothing here yet."""
