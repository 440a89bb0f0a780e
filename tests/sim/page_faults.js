// What is wrong with a page that is open in a browser: a line a fault.
() => {
  const found = [], seen = element => {
    const style = getComputedStyle(element), box = element.getBoundingClientRect();
    return style.visibility !== 'hidden' && style.display !== 'none' && box.width > 0 && box.height > 0
      && !element.closest('.unseen, .skip, .cards thead') && style.clipPath === 'none';
  };
  const told = element => `${element.tagName.toLowerCase()} "${element.textContent.trim().slice(0, 40)}"`;
  const root = document.documentElement;
  if (root.scrollWidth > innerWidth) found.push(`overflow: the page is ${root.scrollWidth} wide`);
  const all = [...document.querySelectorAll('body *')].filter(seen);
  for (const element of all) {
    const box = element.getBoundingClientRect(), style = getComputedStyle(element);
    const region = element.closest('.scroll');
    const scrolled = region && region !== element && region.scrollWidth > region.clientWidth;
    if (!scrolled && (box.right > innerWidth + 1 || box.left < -1)) found.push(`outside: ${told(element)}`);
    if (['hidden', 'clip'].includes(style.overflowX) && element.scrollWidth > element.clientWidth + 1)
      found.push(`cut: ${told(element)}`);
    if (style.overflowX === 'auto' && element.scrollWidth > element.clientWidth + 1
        && !(element.tabIndex === 0 && element.getAttribute('aria-label')))
      found.push(`scrolls without focus or name: ${told(element)}`);
  }
  for (const image of document.querySelectorAll('img, svg')) {
    const words = image.getAttribute('alt') || image.getAttribute('aria-label');
    if (image.getAttribute('aria-hidden') !== 'true' && !(words && words.trim().length > 20))
      found.push(`no alternative: ${image.outerHTML.slice(0, 60)}`);
    if (image.tagName === 'IMG' && (!image.complete || !image.naturalWidth)) found.push('broken picture');
  }
  let level = 0;
  for (const heading of document.querySelectorAll('h1, h2, h3, h4, h5, h6')) {
    const next = +heading.tagName[1];
    if (next > level + 1) found.push(`heading skips from ${level}: ${told(heading)}`);
    level = next;
  }
  if (document.querySelectorAll('h1').length !== 1) found.push('not one h1');
  const ids = [...document.querySelectorAll('[id]')].map(element => element.id);
  for (const id of new Set(ids)) if (ids.filter(other => other === id).length > 1) found.push(`id twice: ${id}`);
  for (const link of document.querySelectorAll('a[href^="#"]'))
    if (!document.getElementById(link.getAttribute('href').slice(1))) found.push(`leads nowhere: ${told(link)}`);
  for (const table of document.querySelectorAll('table')) {
    if (!table.caption || !table.caption.textContent.trim()) found.push(`no caption: ${told(table)}`);
    if ([...table.querySelectorAll('th')].some(cell => !cell.scope)) found.push(`no scope: ${told(table)}`);
  }
  for (const name of ['main', 'header', 'nav'])
    if (document.querySelectorAll(name).length !== 1) found.push(`no landmark ${name}`);
  if (!root.lang) found.push('no language');

  const linear = value => value <= .04045 ? value / 12.92 : ((value + .055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => .2126 * linear(r / 255) + .7152 * linear(g / 255) + .0722 * linear(b / 255);
  const parts = colour => (colour.match(/[\d.]+/g) || []).map(Number);
  const over = (top, below) => { const a = top[3] ?? 1; return [0, 1, 2].map(i => a * top[i] + (1 - a) * below[i]); };
  const behind = element => {
    const layers = [];
    for (let each = element; each; each = each.parentElement) layers.push(parts(getComputedStyle(each).backgroundColor));
    return layers.reverse().reduce((below, top) => over(top, below),
      matchMedia('(prefers-color-scheme: dark)').matches ? [0, 0, 0] : [255, 255, 255]);
  };
  const poor = new Set();
  for (const element of all) {
    if (![...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim())) continue;
    const back = behind(element), ink = over(parts(getComputedStyle(element).color), back);
    const [high, low] = [light(ink), light(back)].sort((a, b) => b - a);
    const contrast = (high + .05) / (low + .05);
    if (contrast < 4.5) poor.add(`contrast ${contrast.toFixed(2)}: ${told(element)}`);
  }
  return [...new Set(found), ...poor];
}
