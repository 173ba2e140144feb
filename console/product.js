// One product: its images before and after, and what became of each.

import { h, fill, icon } from './dom.js'
import { call, get, withQuery } from './api.js'
import { bytes, count, fileOf, hostOf, plural, price, saved, writtenHostOf } from './format.js'
import { busy, button, confirm, failure, pill, skeletons, timeAgo, toast, emptyState } from './ui.js'
import { follow, imagePill, picture, tally } from './images.js'
import { comparison } from './compare.js'
import { editProduct } from './editor.js'
import { listPlace } from './products.js'

export async function productView({ root, id, signal }) {
  const back = h('a', { class: 'back', href: listPlace() }, icon('back'), h('span', null, 'Products'))
  const body = h('div', null, skeletons(1, 'title'), h('div', { class: 'product' }, skeletons(1, 'viewer'), skeletons(1, 'panel')))
  root.append(back, body)
  const load = async () => {
    try {
      const { data } = await get(`/products/${id}`, signal)
      new ProductPage(body, data, signal).start()
    } catch (problem) {
      if (signal.aborted) return
      if (problem.status === 404) fill(body, emptyState({ icon: 'search', title: `There is no product ${id}`, text: 'It may have been deleted.' }))
      else fill(body, failure(problem, load))
    }
  }
  await load()
}

class ProductPage {
  constructor(body, product, signal) {
    this.body = body
    this.product = product
    this.leaving = signal
    this.selected = Math.max(0, product.images.findIndex((image) => image.url))
    this.viewer = h('div', { class: 'viewer' })
    this.rows = h('ol', { class: 'image-rows' })
    this.totals = h('div', { class: 'totals' })
    this.heading = h('div')
    this.facts = h('dl', { class: 'facts' })
  }

  start() {
    fill(this.body, this.heading, h('div', { class: 'product' },
      h('div', null, this.viewer, this.totals),
      h('section', { class: 'panel', 'aria-label': 'Images' }, h('h2', null, 'Images'), this.rows, h('h2', null, 'Product'), this.facts)))
    this.update(this.product)
    this.follow()
  }

  // A stream is for the images that are pending now; an edit or a replay begins a new one.
  follow() {
    this.following?.abort()
    this.following = new AbortController()
    if (tally(this.product).pending) follow(this.product, (p) => this.update(p), AbortSignal.any([this.leaving, this.following.signal]))
  }

  update(product) {
    this.product = product
    document.title = `${product.product_name} · pms`
    this.selected = Math.min(this.selected, Math.max(0, product.images.length - 1))
    this.drawHeading()
    this.drawViewer()
    this.drawRows()
    this.drawTotals()
    this.drawFacts()
  }

  drawHeading() {
    if (this.actions) { // stays as it is, so that it keeps the focus
      this.name.textContent = this.product.product_name
      this.price.textContent = price(this.product.product_price)
      this.description.textContent = this.product.product_description
      return
    }
    const edit = button('Edit', { icon: 'edit', onclick: () => editProduct(this.product, (p) => { this.update(p); this.follow() }) })
    const remove = button('Delete', { icon: 'trash', kind: 'quiet', onclick: () => this.remove(remove) })
    this.actions = h('div', { class: 'actions' }, remove, edit)
    this.name = h('h1', null, this.product.product_name)
    this.price = h('p', { class: 'price' }, price(this.product.product_price))
    this.description = h('p', { class: 'description' }, this.product.product_description)
    fill(this.heading, h('header', { class: 'head' }, h('div', null, this.name, this.price), this.actions), this.description)
  }

  // The viewer is drawn anew only when what it shows has changed: a comparison in
  // hand is not to be taken away because another image became ready.
  drawViewer() {
    const image = this.product.images[this.selected]
    const shown = JSON.stringify([this.selected, image])
    if (shown === this.shown) return
    this.shown = shown
    if (!image) fill(this.viewer, h('div', { class: 'stage' }, picture(null)))
    else if (image.url) fill(this.viewer, comparison(image, `${this.product.product_name}, image ${this.selected + 1}`))
    else fill(this.viewer, h('div', { class: 'stage' }, picture(image)))
  }

  drawRows() {
    const focused = [...this.rows.querySelectorAll('button')].indexOf(document.activeElement)
    fill(this.rows, this.product.images.map((image, position) => this.row(image, position)))
    if (!this.product.images.length) fill(this.rows, h('li', { class: 'none' }, 'This product has no images.'))
    if (focused >= 0) this.rows.querySelectorAll('button')[focused]?.focus()
  }

  row(image, position) {
    const current = position === this.selected
    const choose = h('button', {
      type: 'button', class: 'image-row', 'aria-pressed': String(current), 'aria-label': `Show image ${position + 1}, ${fileOf(image.source)}`,
      onclick: () => { this.selected = position; this.drawViewer(); this.drawRows() },
    }, h('span', { class: 'mini' }, picture(image)),
    h('span', { class: 'image-source' }, h('strong', null, fileOf(image.source)), h('span', { class: 'meta' }, hostOf(image.source))),
    imagePill(image))
    return h('li', null, choose, imageDetails(image), image.status === 'failed' && this.failedActions(image, position))
  }

  failedActions(image, position) {
    const replay = button('Replay', { icon: 'replay', onclick: () => busy(replay, () => this.replay(image, position)) })
    return h('div', { class: 'row-actions' }, replay, h('a', { class: 'button quiet', href: '#' + withQuery('/dead-letters', { host: writtenHostOf(image.source) }) }, 'Dead letters of this host'))
  }

  // A product does not name its dead letters: they are found by what they share.
  async replay(image, position) {
    const filter = { code: image.error.code, user_id: this.product.user_id, limit: 200 }
    let letter
    for (let cursor; !letter && cursor !== null;) {
      const { data } = await get(withQuery('/dead-letters', { ...filter, cursor }), this.leaving)
      letter = data.items.find((one) => one.product_id === this.product.id && one.position === position)
      cursor = data.next_cursor
    }
    if (!letter) {
      toast('This image is no dead letter any more: it was discarded or replayed.', 'bad')
      return
    }
    await call('POST', `/dead-letters/${letter.id}/replay`)
    toast('The image is queued anew.')
    const { data } = await get(`/products/${this.product.id}`, this.leaving)
    this.update(data)
    this.follow()
  }

  drawTotals() {
    const ready = this.product.images.filter((image) => image.status === 'ready')
    const before = ready.reduce((sum, image) => sum + (image.source_bytes ?? 0), 0)
    const after = ready.reduce((sum, image) => sum + image.bytes, 0)
    if (!before) {
      fill(this.totals)
      return
    }
    const bar = h('div', { class: 'saving-bar', 'aria-hidden': 'true' }, h('span'))
    bar.style.setProperty('--kept', `${Math.min(100, after / before * 100)}%`)
    fill(this.totals, figure('Originals', bytes(before)), figure('Stored', bytes(after)), figure('Saved', `${saved(before, after)} %`, 'good'), bar)
  }

  drawFacts() {
    const p = this.product
    const { ready, pending, failed } = tally(p)
    fill(this.facts, [
      ['ID', String(p.id)], ['User', String(p.user_id)], ['Version', count(p.version)],
      ['Images', p.images.length ? [`${ready} of ${p.images.length} ready`, pending > 0 && pill('busy', 'Live'), failed > 0 && pill('bad', `${failed} failed`)] : 'none'],
      ['Created', timeAgo(p.created_at)], ['Changed', timeAgo(p.updated_at)],
    ].map(([name, value]) => h('div', null, h('dt', null, name), h('dd', null, value))))
  }

  async remove(control) {
    const yes = await confirm({
      title: 'Delete this product?', action: 'Delete', danger: true,
      text: `“${this.product.product_name}” and its ${plural(this.product.images.length, 'image')} will be gone for good.`,
    })
    if (!yes) return
    await busy(control, async () => {
      await call('DELETE', `/products/${this.product.id}`)
      toast('The product is deleted.')
      location.hash = '#/products'
    })
  }
}

function figure(name, value, kind = '') {
  return h('div', { class: `figure ${kind}` }, h('span', { class: 'figure-name' }, name), h('span', { class: 'figure-value' }, value))
}

function imageDetails(image) {
  if (image.status === 'ready') {
    const smaller = saved(image.source_bytes, image.bytes)
    return h('p', { class: 'image-details' },
      h('span', null, `${image.width} × ${image.height}`),
      h('span', null, `${bytes(image.source_bytes)} → ${bytes(image.bytes)}`),
      h('span', { class: smaller > 0 ? 'good' : '' }, smaller > 0 ? `${smaller} % smaller` : 'kept as it was'),
      image.attempts > 0 && h('span', null, `after ${plural(image.attempts, 'failed try', 'failed tries')}`))
  }
  if (!image.error) return null
  return h('p', { class: 'image-details' }, h('code', null, image.error.code), h('span', { class: 'break' }, image.error.detail), h('span', null, plural(image.attempts, 'try', 'tries')))
}
