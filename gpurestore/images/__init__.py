"""CRIU's image format: its messages, containers and folders, and the manifest that we add."""
