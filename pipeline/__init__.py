"""The trio pipelines for dump and restore, their progress display and their trace."""
