"""What system and interop tests share: victims, the tool as a command, processes, CRIU as a reference."""
