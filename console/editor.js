// The form in which a product is made or changed.

import { h, fill, icon } from './dom.js'
import { call, get } from './api.js'
import { price } from './format.js'
import { busy, button, confirm, field, iconButton, openDialog, setError, toast } from './ui.js'

const maxImages = 20
const userKey = 'pms.user' // whose product was created last

/** Opens the form for a product, or for a new one if it is null. done gets the result. */
export function editProduct(product, done) {
  new Editor(product, done).open()
}

class Editor {
  constructor(product, done) {
    this.base = product // what the reader saw, and what If-Match speaks of
    this.done = done
    this.user = h('input', { name: 'user_id', inputMode: 'numeric', required: true, autocomplete: 'off', value: sessionStorage.getItem(userKey) ?? '1' })
    this.name = h('input', { name: 'product_name', maxLength: 200, required: true, autocomplete: 'off', value: product?.product_name ?? '' })
    this.price = h('input', { name: 'product_price', inputMode: 'decimal', required: true, autocomplete: 'off', placeholder: '0.00', value: product ? fixed(product.product_price) : '' })
    this.description = h('textarea', { name: 'product_description', rows: 3, maxLength: 10000, value: product?.product_description ?? '' })
    this.images = new ImageList(product?.product_images ?? [''])
    this.notice = h('div', { role: 'alert' })
    this.shown = this.values() // what the form made of base: its controls drop and replace characters
  }

  async open() {
    const isNew = this.base === null
    this.save = h('button', { type: 'submit', class: 'button primary' }, icon('check'), h('span', null, isNew ? 'Create' : 'Save'))
    const cancel = button('Cancel', { onclick: async () => (await this.mayClose()) && dialog.close() })
    const form = h('form', { class: 'form', noValidate: true, onsubmit: (event) => { event.preventDefault(); busy(this.save, () => this.submit()) } },
      this.notice,
      field('Name', this.name),
      h('div', { class: 'columns' }, field('Price', this.price, { hint: 'At most two decimals.' }), isNew && field('User ID', this.user, { hint: 'Whose product it is.' })),
      field('Description', this.description),
      this.images.element,
      h('div', { class: 'form-actions' }, cancel, this.save))
    const { dialog, closed } = openDialog({ title: isNew ? 'New product' : 'Edit product', content: form, kind: 'sheet', mayClose: () => this.mayClose() })
    this.dialog = dialog
    this.name.focus()
    await closed
  }

  async mayClose() {
    if (JSON.stringify(this.values()) === JSON.stringify(this.shown)) return true
    return confirm({ title: 'Leave without saving?', text: 'What you have typed will be lost.', action: 'Leave', danger: true })
  }

  values() {
    return {
      product_name: this.name.value.trim(),
      product_price: this.price.value.trim().replace(',', '.'),
      product_description: this.description.value,
      product_images: this.images.urls(),
    }
  }

  async submit() {
    this.clearErrors()
    try {
      const product = this.base ? await this.change() : await this.create()
      if (!product) return
      this.dialog.close()
      this.done(product)
    } catch (problem) {
      this.show(problem)
    }
  }

  // The key makes the second of two equal requests, of which the first may have
  // got through though its answer did not, answer with the same product.
  async create() {
    const body = { user_id: Number(this.user.value) || this.user.value, ...this.values() }
    const text = JSON.stringify(body)
    if (this.sent !== text) {
      this.sent = text
      this.key = Array.from(crypto.getRandomValues(new Uint8Array(16)), (b) => b.toString(16).padStart(2, '0')).join('')
    }
    const { data } = await call('POST', '/products', { body, headers: { 'Idempotency-Key': this.key } })
    sessionStorage.setItem(userKey, String(data.user_id))
    toast('The product is created.')
    return data
  }

  async change() {
    const patch = difference(this.shown, this.values())
    if (Object.keys(patch).length === 0) return this.base
    try {
      const { data } = await call('PATCH', `/products/${this.base.id}`, {
        body: patch, type: 'application/merge-patch+json', headers: { 'If-Match': `"${this.base.version}"` },
      })
      toast('The product is saved.')
      return data
    } catch (problem) {
      if (problem.status !== 412) throw problem
      return this.overtaken()
    }
  }

  // A version also grows when an image becomes ready. Only if what a person wrote
  // has changed is there something to decide.
  async overtaken() {
    const { data: now } = await get(`/products/${this.base.id}`)
    const theirs = difference(written(this.base), written(now))
    if (Object.keys(theirs).length === 0) {
      this.base = now
      return this.change()
    }
    this.showConflict(now, theirs)
    return null
  }

  showConflict(now, theirs) {
    const load = button('Take theirs', { onclick: () => this.restart(now) })
    const keep = button('Keep my changes', { onclick: () => this.rebase(now) })
    fill(this.notice, h('div', { class: 'notice bad' }, icon('alert'), h('div', null,
      h('strong', null, 'Somebody else has changed this product meanwhile.'),
      h('dl', { class: 'changes' }, Object.entries(theirs).map(([name, value]) => h('div', null, h('dt', null, labels[name]), h('dd', null, `${shown(name, written(this.base)[name])} → ${shown(name, value)}`)))),
      h('p', null, 'Start over from theirs, or keep your changes on top.'),
      h('div', { class: 'row-actions' }, load, keep))))
    this.notice.scrollIntoView({ block: 'nearest' })
    load.focus()
  }

  // What the reader has not changed becomes theirs, so that saving undoes nothing
  // but what was changed by both.
  rebase(now) {
    const mine = difference(this.shown, this.values())
    this.load(now)
    this.put(mine)
    this.save.focus()
  }

  put(values) {
    if ('product_name' in values) this.name.value = values.product_name
    if ('product_price' in values) this.price.value = values.product_price
    if ('product_description' in values) this.description.value = values.product_description
    if ('product_images' in values) this.images.set(values.product_images)
  }

  restart(now) {
    this.load(now)
    this.name.focus()
  }

  load(now) {
    this.base = now
    this.put(written(now))
    this.shown = this.values()
    fill(this.notice)
  }

  clearErrors() {
    fill(this.notice)
    for (const control of [this.user, this.name, this.price, this.description]) if (control.isConnected) setError(control, '')
    this.images.clearErrors()
  }

  /** Shows a problem, at the fields if it names some. */
  show(problem) {
    const elsewhere = problem.errors?.filter(({ field: name, detail }) => !this.showAt(name, detail)) ?? []
    if (!problem.errors?.length || elsewhere.length) {
      const text = elsewhere.length ? elsewhere.map(({ field: name, detail }) => `${name} ${detail}`).join('; ') : problem.message
      fill(this.notice, h('div', { class: 'notice bad' }, icon('alert'), h('p', null, text)))
    }
    this.dialog.querySelector('[aria-invalid]')?.focus()
  }

  showAt(name, detail) {
    const control = { user_id: this.user, product_name: this.name, product_price: this.price, product_description: this.description }[name]
    if (control?.isConnected) {
      setError(control, sentence(detail))
      return true
    }
    const position = /^product_images(?:\[(\d+)\])?$/.exec(name)
    return position !== null && this.images.setError(position[1], sentence(detail))
  }
}

const labels = { product_name: 'Name', product_price: 'Price', product_description: 'Description', product_images: 'Images' }

function shown(name, value) {
  if (name === 'product_price') return price(value)
  if (name === 'product_images') return value.join('\n') || 'none'
  return value || 'empty'
}

// A number of at most twelve digits is exact in a double.
const fixed = (value) => Number(value).toFixed(2)

/** What of a product people write, as the form has it. */
function written(product) {
  return { product_name: product.product_name, product_price: fixed(product.product_price), product_description: product.product_description, product_images: product.product_images }
}

function difference(before, after) {
  const same = (name) => name === 'product_price'
    ? Number(before[name]) === Number(after[name]) && after[name] !== ''
    : JSON.stringify(before[name]) === JSON.stringify(after[name])
  return Object.fromEntries(Object.keys(after).filter((name) => !same(name)).map((name) => [name, after[name]]))
}

function sentence(detail) {
  return detail.charAt(0).toUpperCase() + detail.slice(1) + (/[.!?]$/.test(detail) ? '' : '.')
}

/** The URLs of a product's images, a row each. Several pasted lines are several rows. */
class ImageList {
  constructor(urls) {
    this.rows = h('ol', { class: 'url-rows' })
    this.error = h('p', { class: 'error', hidden: true })
    this.add = button('Add an image', { icon: 'plus', kind: 'quiet', onclick: () => this.append('').focus() })
    this.element = h('fieldset', null, h('legend', null, 'Images'), h('p', { class: 'hint' }, 'Web addresses of the originals. They are fetched, compressed and stored in the background.'), this.rows, this.error, this.add)
    this.set(urls)
  }

  set(urls) {
    fill(this.rows)
    for (const url of urls) this.append(url)
  }

  inputs() {
    return [...this.rows.querySelectorAll('input')]
  }

  /** The URLs; empty rows are none. */
  urls() {
    return this.inputs().map((input) => input.value.trim()).filter(Boolean)
  }

  append(url, after = null) {
    const input = h('input', { type: 'url', name: 'product_images', value: url, placeholder: 'https://…', autocomplete: 'off', spellcheck: false, onpaste: (event) => this.paste(event, row, input) })
    const up = iconButton('Move up', 'up', { onclick: () => { row.previousElementSibling?.before(row); this.name(); up.focus() } })
    const remove = iconButton('Remove', 'close', { onclick: () => this.remove(row) })
    const block = field('', input)
    block.classList.add('url-field')
    const row = h('li', null, block, h('span', { class: 'url-tools' }, up, remove))
    if (after) after.after(row)
    else this.rows.append(row)
    this.name()
    return input
  }

  remove(row) {
    const next = row.nextElementSibling ?? row.previousElementSibling
    row.remove()
    this.name()
    ;(next?.querySelector('input') ?? this.add).focus()
  }

  paste(event, row, input) {
    const lines = event.clipboardData.getData('text').split(/\s+/).filter(Boolean)
    if (lines.length < 2) return
    event.preventDefault()
    let last = row
    if (!input.value) input.value = lines.shift()
    for (const line of lines) last = this.append(line, last).closest('li')
  }

  // Each control says which image it is for.
  name() {
    this.inputs().forEach((input, n) => {
      const row = input.closest('li')
      row.querySelector('label').textContent = `Image ${n + 1}`
      const [up, remove] = row.querySelectorAll('button')
      up.setAttribute('aria-label', `Move image ${n + 1} up`)
      up.disabled = n === 0
      remove.setAttribute('aria-label', `Remove image ${n + 1}`)
    })
    this.add.disabled = this.inputs().length >= maxImages
  }

  clearErrors() {
    for (const input of this.inputs()) setError(input, '')
    this.error.hidden = true
  }

  /** Shows an error at the nth URL that was sent, or at all of them. */
  setError(position, text) {
    const input = position === undefined ? undefined : this.inputs().filter((one) => one.value.trim())[position]
    if (input) setError(input, text)
    else {
      this.error.textContent = text
      this.error.hidden = false
    }
    return true
  }
}
