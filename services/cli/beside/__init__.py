"""Commands of the services beside sources and fusion service."""
