"""The command line, one file a command: its flags, its call, its printing. `app` loads a command when it is named."""
