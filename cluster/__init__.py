"""Where jobs run: Ray workers, run directories, and the command line."""
