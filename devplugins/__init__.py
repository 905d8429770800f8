"""Device plugins: the hook interface and the devices that are served through it."""
