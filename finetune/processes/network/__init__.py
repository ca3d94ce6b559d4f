"""Connections that only processes of the same run can make."""
