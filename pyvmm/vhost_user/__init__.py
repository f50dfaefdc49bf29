"""The vhost-user protocol: its tables, its pure codec and session, and the frontend.

Layers, lowest first: `messages`, `codec`, `session` are pure; `channel` alone touches the
socket; `memory` describes guest RAM; `frontend` makes one backend into a device.
"""
