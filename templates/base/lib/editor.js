// code-server in one process: without the parent whose child it otherwise is, with its modules compiled ahead, and
// told over a pipe whose it is, so that it can listen before that is known.
//
// Its arguments are code-server's own. EDITOR_OWNER is the number of a file descriptor from which fields are read,
// each ended by a NUL: the password, the folder to open, NAME=VALUE for the environment, and an empty one.
//
// It leans on the inside of the pinned version. Where that is not as expected, it waits for its owner and then does
// what code-server's own command does.
'use strict';
const net = require('node:net');
const { enableCompileCache } = require('node:module');

const CODE_SERVER = '/usr/local/lib/node_modules/code-server/out/node';
const owner = process.env.EDITOR_OWNER;
delete process.env.EDITOR_OWNER;

function whenTold(then) {
    const pipe = new net.Socket({ fd: Number(owner), readable: true, writable: false });
    let text = '';
    pipe.setEncoding('utf8').on('data', (data) => {
        text += data;
        if (!text.endsWith('\0\0')) return;
        const [password, folder, ...environment] = text.split('\0');
        for (const entry of environment) {
            const end = entry.indexOf('=');
            if (end > 0) process.env[entry.slice(0, end)] = entry.slice(end + 1);
        }
        pipe.destroy();
        then(password, folder);
    });
    return pipe;
}

function load() {
    enableCompileCache(`${__dirname}/compile-cache`);
    const { parse, readConfigFile, setDefaults } = require(`${CODE_SERVER}/cli`);
    const { wrapper } = require(`${CODE_SERVER}/wrapper`);
    const { runCodeServer } = require(`${CODE_SERVER}/main`);
    for (const used of [parse, readConfigFile, setDefaults, wrapper.preventExit, wrapper.onDispose, wrapper.exit, runCodeServer]) {
        if (typeof used !== 'function') throw new TypeError('code-server has changed inside');
    }
    return { parse, readConfigFile, setDefaults, wrapper, runCodeServer };
}

async function serve({ parse, readConfigFile, setDefaults, wrapper, runCodeServer }) {
    try {
        const given = parse(process.argv.slice(2));
        const args = await setDefaults(given, await readConfigFile(given.config));
        wrapper.preventExit();
        process.env.NODE_EXEC_PATH = process.execPath; // for its command in terminals
        if (owner) {
            whenTold((password, folder) => {
                args.password = password;
                args._ = [folder];
            }).unref();
        }
        const server = await runCodeServer(args);
        wrapper.onDispose(() => server.dispose());
    } catch (error) {
        console.error(error);
        wrapper.exit(error);
    }
}

function serveAsItself() {
    process.argv[1] = `${CODE_SERVER}/entry.js`;
    require(process.argv[1]);
}

let inside;
try {
    inside = load();
} catch (error) {
    console.error(`workspace: ${error.message.split('\n')[0]}; the editor starts by its own command`);
}
if (inside) {
    serve(inside);
} else if (owner) {
    whenTold((password, folder) => {
        process.argv.push(folder);
        serveAsItself();
    });
} else {
    serveAsItself();
}
