// Runs before the page is painted, so that it does not flash in the other colours.
const theme = localStorage.getItem('theme');
if (theme) document.documentElement.dataset.theme = theme;
