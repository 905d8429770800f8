"""One module per kernel resource: how a dump collects it and how a restore plans it."""
