"""The official client of the Model Context Protocol, in a process of its own since it is asyncio. The first
line of its stdin says with whom it is to talk, each further one what it is to do; it prints what it was told.

{"server": [program, argument...] or a URL, "token": ...}
{"calls": [[tool, arguments, seconds until it is cancelled or null]...], "resources": [URI...]}
"""
import json
import sys

import anyio
import httpx2
from mcp import Client, StdioServerParameters
from mcp.client.streamable_http import streamable_http_client


async def do(client, wanted):
    told = {'progress': [], 'results': [], 'resources': [], 'instructions': client.instructions}

    async def note(progress, total, message):
        told['progress'].append([progress, total, message])

    tools = (await client.list_tools()).tools
    told['tools'] = [tool.model_dump(mode='json', by_alias=True, exclude_none=True) for tool in tools]
    for name, arguments, patience in wanted['calls']:
        result = None
        with anyio.move_on_after(patience):
            result = await client.call_tool(name, arguments, progress_callback=note)
        told['results'].append(result and {
            'error': result.is_error, 'data': result.structured_content,
            'text': '\n'.join(getattr(item, 'text', '') for item in result.content)})
    for uri in wanted['resources']:
        found = await client.read_resource(uri)
        told['resources'].append(found.contents[0].text)
    return told


async def main(server, token):
    if isinstance(server, list):
        server = StdioServerParameters(command=server[0], args=server[1:])
    else:
        headers = {'Authorization': f'Bearer {token}'} if token else {}
        server = streamable_http_client(server, http_client=httpx2.AsyncClient(headers=headers))
    async with Client(server) as client:
        while line := await anyio.to_thread.run_sync(sys.stdin.readline):
            print(json.dumps(await do(client, json.loads(line))), flush=True)


anyio.run(main, *json.loads(sys.stdin.readline()).values())
