// The products as a grid: filtered, sorted and paged as the API does it.

import { h, fill, icon, freshID } from './dom.js'
import { get, withQuery } from './api.js'
import { price, plural } from './format.js'
import { button, emptyState, failure, pill, skeletons, timeAgo } from './ui.js'
import { follow, picture, tally } from './images.js'
import { editProduct } from './editor.js'

const pageSize = 48
const typingPause = 250

const sorts = [
  ['-id', 'Newest first'], ['id', 'Oldest first'],
  ['product_name', 'Name, A to Z'], ['-product_name', 'Name, Z to A'],
  ['product_price', 'Price, low to high'], ['-product_price', 'Price, high to low'],
  ['-created_at', 'Created last'], ['created_at', 'Created first'],
]
const defaultSort = '-id'
const filters = ['name', 'user_id', 'min_price', 'max_price']

let place = '#/products'

/** The list as the reader left it, to go back to. */
export const listPlace = () => place

export function productsView({ root, query, signal }) {
  const state = Object.fromEntries([...filters, 'sort'].map((name) => [name, query.get(name) ?? '']))
  const list = new ProductList(state, signal)
  place = '#' + withQuery('/products', state)
  const create = button('New product', { icon: 'plus', kind: 'primary', onclick: () => editProduct(null, (p) => { location.hash = `#/products/${p.id}` }) })
  root.append(
    h('header', { class: 'head' }, h('h1', null, 'Products'), create),
    filterForm(state, () => {
      place = '#' + withQuery('/products', state)
      history.replaceState(null, '', place)
      list.load()
    }),
    list.element)
  list.load()
}

function filterForm(state, changed) {
  const controls = {}
  const more = h('div', { class: 'filters-more', id: freshID('filters') })
  const toggle = button('Filters', {
    icon: 'filter', kind: 'filter-toggle', 'aria-expanded': 'false', 'aria-controls': more.id,
    onclick: () => toggle.setAttribute('aria-expanded', String(more.classList.toggle('open'))),
  })
  let timer
  const take = (name, delay) => {
    state[name] = controls[name].value.trim()
    clearTimeout(timer)
    timer = setTimeout(apply, delay)
  }
  const apply = () => {
    clear.hidden = !filters.some((name) => state[name])
    changed()
  }
  const input = (name, label, properties) => {
    controls[name] = h('input', { name, value: state[name], 'aria-label': label, placeholder: label, autocomplete: 'off', oninput: () => take(name, typingPause), ...properties })
    return controls[name]
  }
  controls.sort = h('select', { name: 'sort', 'aria-label': 'Sort', onchange: () => take('sort', 0) },
    sorts.map(([value, text]) => h('option', { value: value === defaultSort ? '' : value, selected: value === (state.sort || defaultSort) }, text)))
  const clear = button('Clear', {
    icon: 'close', kind: 'quiet', hidden: !filters.some((name) => state[name]), onclick: () => {
      for (const name of filters) controls[name].value = state[name] = ''
      apply()
      controls.name.focus()
    },
  })
  more.append(
    input('user_id', 'User ID', { inputMode: 'numeric', class: 'narrow' }),
    h('span', { class: 'range' }, input('min_price', 'Min. price', { inputMode: 'decimal', class: 'narrow' }), h('span', { 'aria-hidden': 'true' }, '–'), input('max_price', 'Max. price', { inputMode: 'decimal', class: 'narrow' })),
    controls.sort, clear)
  return h('form', { class: 'filters', role: 'search', 'aria-label': 'Filter products', onsubmit: (event) => { event.preventDefault(); clearTimeout(timer); apply() } },
    h('span', { class: 'search' }, icon('search'), input('name', 'Search by name', { type: 'search' })), toggle, more)
}

/** The pages that were read so far, as cards. */
class ProductList {
  constructor(state, signal) {
    this.state = state
    this.leaving = signal
    this.grid = h('ul', { class: 'grid' })
    this.summary = h('p', { class: 'summary', role: 'status' })
    this.foot = h('div', { class: 'foot' })
    this.element = h('section', { 'aria-label': 'Products' }, this.summary, this.grid, this.foot)
  }

  /** Reads the first page; what an earlier call is about to show comes too late. */
  async load() {
    this.current?.abort()
    this.current = new AbortController()
    this.signal = AbortSignal.any([this.leaving, this.current.signal])
    this.shown = 0
    fill(this.summary, 'Loading…')
    fill(this.foot)
    fill(this.grid, skeletons(8, 'card').map((bone) => h('li', null, bone)))
    await this.page(null)
  }

  async page(cursor) {
    const { signal } = this
    try {
      const { data } = await get(withQuery('/products', { sort: defaultSort, ...clean(this.state), limit: pageSize, cursor }), signal)
      if (!cursor) fill(this.grid)
      this.show(data, cursor !== null, signal)
    } catch (problem) {
      if (signal.aborted) return
      this.fail(problem, cursor)
    }
  }

  show({ items, next_cursor: next }, isMore, signal) {
    const cards = items.map((product) => this.card(product, signal))
    this.grid.append(...cards)
    this.shown += items.length
    fill(this.summary, this.shown ? `${plural(this.shown, 'product')}${next ? ', and there are more' : ''}` : '')
    if (!this.shown) fill(this.foot, this.nothing())
    else fill(this.foot, next && button('Show more', { onclick: (event) => { event.currentTarget.disabled = true; this.page(next) } }))
    if (isMore) cards[0]?.querySelector('a').focus()
  }

  nothing() {
    if (filters.some((name) => this.state[name])) {
      return emptyState({ icon: 'search', title: 'No product matches', text: 'Try a shorter name, or a wider range of prices.' })
    }
    const first = button('Create a product', { icon: 'plus', kind: 'primary', onclick: () => editProduct(null, (p) => { location.hash = `#/products/${p.id}` }) })
    return emptyState({ icon: 'products', title: 'No products yet', text: 'Create one with image URLs and watch the images become ready.', action: first })
  }

  fail(problem, cursor) {
    const wrong = problem.errors?.map(({ field, detail }) => `${fieldNames[field] ?? field} ${detail}`).join('; ')
    if (wrong) {
      fill(this.grid)
      fill(this.summary)
      fill(this.foot, emptyState({ icon: 'filter', title: 'This filter cannot be used', text: wrong + '.' }))
      return
    }
    if (!cursor) fill(this.grid)
    fill(this.summary)
    fill(this.foot, failure(problem, () => cursor ? this.page(cursor) : this.load()))
  }

  card(product, signal) {
    const item = h('li')
    const draw = (now) => fill(item, cardOf(now))
    draw(product)
    if (tally(product).pending) follow(product, draw, signal)
    return item
  }
}

const fieldNames = { user_id: 'User ID', min_price: 'Min. price', max_price: 'Max. price', name: 'Name', sort: 'Sort' }

function clean(state) {
  return Object.fromEntries(Object.entries(state).filter(([, value]) => value))
}

function cardOf(product) {
  const { pending, failed } = tally(product)
  const best = product.images.find((image) => image.url) ?? product.images.find((image) => image.status === 'pending') ?? product.images[0]
  return h('a', { class: 'card', href: `#/products/${product.id}` },
    h('span', { class: 'thumb' }, picture(best),
      product.images.length > 1 && h('span', { class: 'badge' }, icon('image'), String(product.images.length), h('span', { class: 'hidden' }, ' images'))),
    h('span', { class: 'card-body' },
      h('span', { class: 'card-line' }, h('span', { class: 'card-name' }, product.product_name), h('span', { class: 'card-price' }, price(product.product_price))),
      h('span', { class: 'card-line meta' }, h('span', null, `#${product.id} · user ${product.user_id}`),
        pending || failed
          ? h('span', { class: 'pills' }, pending > 0 && pill('busy', `${pending} in work`), failed > 0 && pill('bad', `${failed} failed`))
          : timeAgo(product.created_at))))
}
