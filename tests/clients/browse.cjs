// Opens pages in headless Chromium; reads commands, one JSON per line, from stdin and answers each with one line.
const { chromium } = require('playwright-core');
const readline = require('node:readline');

const heard = [];

async function main() {
  const browser = await chromium.launch({ executablePath: process.argv[2], args: ['--no-sandbox'] });
  const page = await browser.newPage();
  page.on('console', (message) => heard.push(message.text()));
  page.on('pageerror', (error) => heard.push(`ERROR ${error.message}`));
  const commands = {
    open: async ({ url }) => { heard.length = 0; await page.goto(url); },
    text: async () => page.textContent('body'),
    heard: async () => heard,
    evaluate: async ({ code }) => page.evaluate(code),
    close: async () => browser.close(),
  };
  for await (const line of readline.createInterface({ input: process.stdin })) {
    const { command, ...options } = JSON.parse(line);
    try {
      console.log(JSON.stringify({ result: (await commands[command](options)) ?? null }));
    } catch (error) {
      console.log(JSON.stringify({ error: String(error) }));
    }
    if (command === 'close') break;
  }
}

main();
