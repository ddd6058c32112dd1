"""What test modules share and no fixture is: looks into the state file, and ways to lose it."""
import contextlib
import json
import sqlite3

import docker


def state_path(server):
    """Return the path of a server's state file."""
    return server.folder / 'state' / f'{server.instance}.sqlite'


def kept(path, table='workspaces'):
    """Return the records of a table of a state file as they are on disk; those of workspaces and sessions by
    their ids."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        records = [json.loads(text) for text, in connection.execute(f'SELECT record FROM {table}')]
    return records if table == 'runs' else {record['id']: record for record in records}


def lose(path):
    """Remove a state file with what SQLite keeps beside it."""
    for end in ('', '-wal', '-shm'):
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + end).unlink()


def give_records(server, *workspaces):
    """Let a server that is stopped know workspaces when it starts: those of the file that earlier versions
    kept are taken over."""
    lose(state_path(server))
    state_path(server).with_suffix('.json').write_text(json.dumps({'version': 1, 'workspaces': workspaces}))


def same_mounts(client, inspected, **options):
    """Return a host config with the mounts of a container: the volume is a part of what makes it a
    workspace's."""
    mounts = [docker.types.Mount(target=mount['Destination'], source=mount['Name'], type='volume')
              for mount in inspected['Mounts']]
    return client.api.create_host_config(mounts=mounts, **options)
