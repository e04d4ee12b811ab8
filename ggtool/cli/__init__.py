"""The command line: one file per command, with its flags, its call and its printing. `app` imports a command when it is named."""
