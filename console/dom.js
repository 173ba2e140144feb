// Building the page. Nothing here takes HTML text: what comes from the API, and
// so from whoever wrote it there, can only ever become text.

const svgNamespace = 'http://www.w3.org/2000/svg'

/**
 * Makes an element. Properties that begin with "on" are listeners, "class" and
 * names with "-" are attributes, null and false leave a property out. Children
 * are nodes, texts, lists of them, or nothing.
 */
export function h(tag, properties, ...children) {
  const element = document.createElement(tag)
  for (const [name, value] of Object.entries(properties ?? {})) set(element, name, value)
  element.append(...nodes(children))
  return element
}

function set(element, name, value) {
  if (value === null || value === undefined || value === false) return
  if (name.startsWith('on')) element.addEventListener(name.slice(2), value)
  else if (name in element && !name.includes('-')) element[name] = value
  else element.setAttribute(name === 'class' ? 'class' : name, value === true ? '' : value)
}

function nodes(children) {
  return children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false)
}

/** Makes an SVG element. */
export function svg(tag, attributes, ...children) {
  const element = document.createElementNS(svgNamespace, tag)
  for (const [name, value] of Object.entries(attributes ?? {})) element.setAttribute(name, value)
  element.append(...nodes(children))
  return element
}

/** An icon of the sprite in index.html. It says nothing to a screen reader. */
export function icon(name) {
  return svg('svg', { class: 'icon', 'aria-hidden': 'true' }, svg('use', { href: '#i-' + name }))
}

/** Puts new children in the place of an element's old ones. */
export function fill(element, ...children) {
  element.replaceChildren(...nodes(children))
  return element
}

let ids = 0

/** An id that no other element has. */
export function freshID(prefix) {
  return `${prefix}-${++ids}`
}
