"""What each command does once its flags are parsed: one file a command. Only the command line imports these."""
