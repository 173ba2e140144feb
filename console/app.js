// Where a view begins: the part of the URL after # names it, as in
// #/products?name=shoe. A view gets the element to fill and a signal that is
// aborted when the reader goes elsewhere, which ends its requests and streams.

import { h, fill } from './dom.js'
import { watchSession, watchTheme, watchHealth } from './session.js'
import { productsView } from './products.js'
import { productView } from './product.js'
import { deadLettersView } from './deadletters.js'
import { overviewView } from './overview.js'
import { emptyState } from './ui.js'

const routes = [
  [/^\/products$/, 'products', 'Products', productsView],
  [/^\/products\/(\d+)$/, 'products', 'Product', productView],
  [/^\/dead-letters$/, 'dead-letters', 'Dead letters', deadLettersView],
  [/^\/overview$/, 'overview', 'Overview', overviewView],
]

const main = document.getElementById('main')
let leaving = new AbortController()

function show({ focus = true } = {}) {
  leaving.abort()
  leaving = new AbortController()
  const [path, search = ''] = (location.hash.slice(1) || '/products').split('?')
  const route = routes.find(([pattern]) => pattern.test(path))
  for (const link of document.querySelectorAll('[data-section]')) {
    if (link.dataset.section === route?.[1]) link.setAttribute('aria-current', 'page')
    else link.removeAttribute('aria-current')
  }
  document.title = `${route?.[2] ?? 'Not found'} · pms`
  const root = h('div', { class: 'view' })
  fill(main, root)
  scrollTo(0, 0)
  if (route) route[3]({ root, path, id: route[0].exec(path)[1], query: new URLSearchParams(search), signal: leaving.signal })
  else root.append(emptyState({ icon: 'search', title: 'There is nothing here', action: h('a', { class: 'button', href: '#/products' }, 'All products') }))
  if (focus) main.focus({ preventScroll: true })
}

document.getElementById('skip').addEventListener('click', (event) => {
  event.preventDefault()
  main.focus()
})
addEventListener('hashchange', () => show())
watchTheme()
watchSession(() => show())
watchHealth()
show({ focus: false })
