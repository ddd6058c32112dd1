// An agent for the tests: the first word of the task says how it behaves. Every line that it prints is an event, or plain text.
const { spawn } = require('child_process');
const fs = require('fs');
const [scenario, ...words] = fs.readFileSync(0, 'utf8').trim().split(' ');
const say = (type, data) => fs.writeSync(1, JSON.stringify({ type, data }) + '\n');
const print = (text) => { for (let data = Buffer.from(text); data.length;) data = data.subarray(fs.writeSync(1, data)); };
const stay = () => setInterval(() => {}, 1000);
const child = (seconds) => spawn('sleep', [seconds], { stdio: ['ignore', 'inherit', 'ignore'], detached: true }).unref();
const scenarios = {
  say: () => { say('progress', { step: 1, total: 2, message: words.join(' ') }); say('message', { message: 'said' }); say('result', { message: 'ok' }); },
  count: () => { for (let n = 1; n <= +words[0]; n++) say('progress', { step: n, total: +words[0], message: 'n' + n }); },
  long: () => { print(JSON.stringify({ type: 'message', data: { message: 'x'.repeat(10 * 2 ** 20) } }) + '\n'); say('message', { message: 'after' }); },
  garbage: () => { print(Buffer.from([0xff, 0xfe, 10, 0, 10])); print('{"type": []}\n[1]\n{"type":"log"}\nnull\n{"type":"progress","data":{"step":NaN}}\n{"type":"log","data":{"deleted":true}}\n\u2028 strange\n\n'); },
  half: () => { say('message', { message: 'whole' }); print('{"type":"message","data":{"mess'); process.stderr.write('it broke\n'); process.kill(process.pid, 'SIGSEGV'); },
  leave: () => { child('71.5'); say('result', { message: 'left one' }); },
  child: () => { child('72.5'); say('message', { message: 'started' }); stay(); },
  stubborn: () => { process.on('SIGINT', () => say('message', { message: 'no' })); process.on('SIGTERM', () => {}); say('message', { message: 'started' }); stay(); },
  linger: () => { say('result', { message: 'done, but here' }); stay(); },
  silent: () => stay(),
  chatter: () => setInterval(() => say('log', { stream: 'agent', message: 'still' }), 100),
  flood: () => setInterval(() => print('flood '.repeat(20000) + '\n'), 10),
  exit: () => { process.stderr.write('sorry\n'); process.exit(+words[0]); },
  fail: () => { say('error', { code: 'MY_CODE', message: 'as told' }); process.exit(0); },
  wait: () => { say('message', { message: 'started' }); setTimeout(() => say('result', { message: 'waited' }), 1000 * +words[0]); },
  mutter: () => { let n = 0; const told = setInterval(() => { process.stderr.write(`at ${++n}\n`); if (n == +words[0]) { clearInterval(told); say('result', { message: 'muttered' }); } }, 500); },
  paced: () => { let n = 0; const told = setInterval(() => { n++; say('message', { message: `word ${n}` }); if (n == 4) { clearInterval(told); say('result', { message: 'all said' }); } }, 500); },
  size: () => { say('message', { message: String(words.join(' ').length) }); say('result', { message: words.at(-1) }); },
  late: () => { spawn('sh', ['-c', 'sleep 2; echo too late'], { stdio: ['ignore', 'inherit', 'ignore'], detached: true }).unref(); print('half a line'); },
};
scenarios[scenario]();
