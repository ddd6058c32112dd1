"""The official client of the Model Context Protocol, in a process of its own since it is asyncio: it reads
what it is to do as JSON from stdin, and prints what it was told.

{"server": [program, argument...] or a URL, "token": ..., "resources": [URI...],
 "calls": [[tool, arguments, seconds until it is cancelled or null]...]}
"""
import json
import sys

import anyio
import httpx2
from mcp import Client, StdioServerParameters
from mcp.client.streamable_http import streamable_http_client


async def main(wanted):
    told = {'progress': []}

    async def note(progress, total, message):
        told['progress'].append([progress, total, message])

    server, headers = wanted['server'], {}
    if isinstance(server, list):
        server = StdioServerParameters(command=server[0], args=server[1:], env=wanted.get('env'))
    else:
        headers = {'Authorization': f"Bearer {wanted['token']}"} if wanted.get('token') else {}
        server = streamable_http_client(server, http_client=httpx2.AsyncClient(headers=headers))
    async with Client(server) as client:
        tools = (await client.list_tools()).tools
        told['instructions'] = client.instructions
        told['tools'] = [tool.model_dump(mode='json', by_alias=True, exclude_none=True) for tool in tools]
        told['results'], told['resources'] = [], []
        for name, arguments, patience in wanted.get('calls', ()):
            result = None
            with anyio.move_on_after(patience):
                result = await client.call_tool(name, arguments, progress_callback=note)
            told['results'].append(result and {
                'error': result.is_error, 'data': result.structured_content,
                'text': '\n'.join(getattr(item, 'text', '') for item in result.content)})
        for uri in wanted.get('resources', ()):
            found = await client.read_resource(uri)
            told['resources'].append(found.contents[0].text)
    print(json.dumps(told))


anyio.run(main, json.load(sys.stdin))
