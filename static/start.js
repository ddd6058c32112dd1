// Runs before the page is painted, as a plain script: it sets the colours, so that the page does not flash in
// others, and says what keeps the page from coming up, which the modules can't do when it is they that fail.

(() => {
  const SLOW = 1500; // ms until the page says that it loads
  const RELOADS = 6; // times that it loads itself again within a minute
  const MINUTE = 60000; // ms
  let recovering = null;

  /** Return what a storage does, or nothing where the browser allows none. */
  const guarded = (use) => { try { return use(); } catch { return undefined; } };
  const isUp = () => !['starting', 'failed'].includes(document.body.dataset.view);

  /** Say in the place of the page what is wrong with it. */
  function sayFailure(title, text = '', code = '') {
    const box = document.getElementById('failure');
    box.querySelector('h1').textContent = title;
    box.querySelector('code').textContent = code;
    box.querySelector('p').textContent = text;
    box.querySelector('button').onclick = () => location.reload();
    box.hidden = false;
    document.body.dataset.view = 'failed';
  }

  /** Tell whether the page may load itself again: not for ever. */
  function mayReload() {
    const now = Date.now();
    return guarded(() => {
      const all = JSON.parse(sessionStorage.getItem('reloaded') ?? '[]');
      const times = all.filter((time) => now - time < MINUTE);
      sessionStorage.setItem('reloaded', JSON.stringify([...times, now]));
      return times.length < RELOADS;
    }) ?? false;
  }

  const pause = (tries) => new Promise((resolve) => setTimeout(resolve, Math.min(5000, 250 * 2 ** tries)));

  /** Get over a file that was not loaded. A module says nothing of why, but a call that has an Origin, as
   * modules have, is told. Chromium gives up what it loads when a network interface comes or goes, as with
   * every container; of that nothing is left when the server is asked again. */
  async function recover(url) {
    for (let tries = 0; ; tries += 1) {
      const answer = await fetch('health', { method: 'OPTIONS' }).catch(() => null);
      if (answer?.ok) {
        if (mayReload()) location.reload();
        else sayFailure('A part of this page was not loaded', `It is ${url}.`);
        return;
      }
      if (answer) {
        const told = await answer.json().catch(() => ({}));
        sayFailure('The server refuses this page', told.error ?? `It answered ${answer.status}.`, told.code);
        return;
      }
      if (tries === 2) sayFailure('The server does not answer', `Nothing was heard from ${location.origin}.`);
      await pause(tries);
    }
  }

  function onError({ target, message, filename, lineno }) {
    if (target.tagName === 'SCRIPT' || target.rel === 'stylesheet') {
      recovering ??= recover(target.src || target.href);
    } else if (target === window && !isUp()) {
      sayFailure('This page failed', `${message} (${filename.split('/').pop()}, line ${lineno})`);
    }
  }

  const theme = guarded(() => localStorage.getItem('theme'));
  if (theme) document.documentElement.dataset.theme = theme;
  window.sayFailure = sayFailure;
  window.addEventListener('error', onError, true);
  window.addEventListener('unhandledrejection', ({ reason }) => {
    if (!isUp()) sayFailure('This page failed', String(reason?.message ?? reason));
  });
  setTimeout(() => {
    const waits = document.body.dataset.view === 'starting' && !document.querySelector('dialog[open]');
    if (waits) sayFailure('Loading…', 'The server takes its time.');
  }, SLOW);
})();
