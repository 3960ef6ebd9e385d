"""The embedded server: requests come in over HTTP, join a batch, and versions follow aliases."""
