"""A policy behind a websocket, in the openpi convention."""
