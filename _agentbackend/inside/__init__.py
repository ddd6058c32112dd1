"""Programs that run inside workspaces, sent there as text with each call: so they always fit this server."""
