"""merge3-client, and RemoteEngine, which drives a daemon as LocalEngine drives this process."""


def __getattr__(name: str):
    if name in ("RemoteEngine", "Target"):
        from merge3.client import channel, remote

        return {"RemoteEngine": remote.RemoteEngine, "Target": channel.Target}[name]
    raise AttributeError(f"module 'merge3.client' has no attribute {name!r}")
