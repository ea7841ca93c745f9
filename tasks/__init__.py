"""Things to train: datasets, tasks, families of tasks. A file with `EXAMPLES` is a member."""
