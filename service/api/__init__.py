"""Thin routers, one file a noun."""
