"""Measure the server, each time against what it stands on.

    ./run.sh bench           all sections, in some 25 minutes
    ./run.sh bench NAME...   only these; they take the place of what bench/results.md has of them

It writes bench/results.md, bench/pictures/ and the table of README.md. The machine should do nothing else;
some 6 GB of memory are used.
"""
import argparse
import importlib
import os
import platform
import re
import resource
import sys
import time
import traceback

import gevent

from _agentbackend import VERSION

from . import ROOT
from .common import HEAD, PICTURES, Bench, Section

SECTIONS = ('creates', 'rest', 'execs', 'agents', 'streams', 'memory', 'growth', 'nodes', 'runs', 'peers')
LIMIT = 900  # seconds that one section may take
RESULTS = ROOT / 'bench' / 'results.md'
INTRODUCTION = """\
# What it takes

Written by `./run.sh bench`. The halves of each pair were measured in the same run, in turn. A ratio is ours
to theirs, of the medians: with times below 1 is faster, with figures per second above 1. Of few values (n)
p95 and p99 are the worst one. Rows in bold stand in the README too.
"""


def main():
    parser = argparse.ArgumentParser(prog='./run.sh bench', description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='*', metavar='NAME', help=', '.join(SECTIONS))
    names = parser.parse_args().names
    if unknown := set(names) - set(SECTIONS):
        parser.error(f"there is no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # for thousands of streams
    PICTURES.mkdir(exist_ok=True)
    bench, failed = Bench(), []
    try:
        machine = describe(bench.client)
        texts = read_results() if names else {}
        for name in names or SECTIONS:
            texts[name], good = run(bench, name)
            failed += [] if good else [name]
            write_results(machine, texts)
    finally:
        bench.close()
    if failed:
        sys.exit(f"not measured: {', '.join(failed)}")


def run(bench, name):
    """Return (text, whether it went well) of a section; one that fails does not take the others along."""
    module = importlib.import_module(f'bench.{name}')
    section = Section(name, module.TITLE)
    print(f'{name}: {module.TITLE}', flush=True)
    measured = f'Measured on {time.strftime("%Y-%m-%d")}, load before {os.getloadavg()[0]:.1f}'
    begun = time.monotonic()
    try:
        with gevent.Timeout(LIMIT):
            module.measure(bench, section)
        good = True
    except (Exception, gevent.Timeout) as error:
        traceback.print_exc()
        section.remark(f'This section broke off: {type(error).__name__}: {str(error)[:300]}')
        good = False
    return section.text(f'{measured}, in {time.monotonic() - begun:.0f} s.'), good


def describe(client):
    """Return what the machine is, as a list of Markdown."""
    engine = client.version()
    with open('/proc/cpuinfo') as file:
        model = re.search(r'^model name\s*: (.*)', file.read(), re.MULTILINE)
    with open('/proc/meminfo') as file:
        memory = int(re.search(r'MemTotal:\s+(\d+)', file.read())[1]) / 2**20
    facts = {'Agent Backend': VERSION,
             'processor': f'{model[1] if model else platform.machine()}, {os.cpu_count()} cores',
             'memory': f'{memory:.0f} GB', 'kernel': platform.release().split('-')[0],
             'Docker': f"{engine['Version']}, {client.info()['Driver']}", 'Python': platform.python_version()}
    return '\n'.join(f'- {name}: {text}' for name, text in facts.items())


def read_results():
    """Return {section: text} of the sections that were measured before."""
    titles = {importlib.import_module(f'bench.{name}').TITLE: name for name in SECTIONS}
    text = RESULTS.read_text() if RESULTS.exists() else ''
    parts = re.split(r'^(?=## )', text, flags=re.MULTILINE)[1:]
    return {titles[part[3:].partition('\n')[0]]: part for part in parts}


def write_results(machine, texts):
    """Write the sections that there are, and the table of the README."""
    text = '\n'.join([INTRODUCTION, f'{machine}\n',
                      *(texts[name].rstrip() + '\n' for name in SECTIONS if name in texts)])
    RESULTS.write_text(text)
    rows = re.findall(r'^\| \*\*.*\n', text, re.MULTILINE)
    table = HEAD + ''.join(row.replace('**', '') for row in rows)
    readme = ROOT / 'README.md'
    readme.write_text(re.sub(r'(?<=<!-- figures -->\n).*?(?=<!-- end of figures -->)', lambda _: table,
                             readme.read_text(), flags=re.DOTALL))


if __name__ == '__main__':
    main()
