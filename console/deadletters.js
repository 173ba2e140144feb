// The images that failed for good: why, how often, and what is to become of them.

import { h, fill, icon } from './dom.js'
import { call, get, withQuery } from './api.js'
import { count, date, duration, fileOf, hostOf, plural } from './format.js'
import { busy, button, confirm, emptyState, failure, iconButton, skeletons, timeAgo, toast } from './ui.js'

const pageSize = 50
const typingPause = 300
const atOnce = 4 // requests of a bulk action in flight

const filters = ['code', 'host', 'user_id', 'since']
const spans = [['', 'Any time'], ['1', 'Last hour'], ['24', 'Last 24 hours'], ['168', 'Last 7 days']] // in hours

export function deadLettersView({ root, query, signal }) {
  const state = Object.fromEntries(filters.map((name) => [name, query.get(name) ?? '']))
  const list = new DeadLetters(state, signal)
  root.append(
    h('header', { class: 'head' }, h('div', null, h('h1', null, 'Dead letters'), h('p', { class: 'lead' }, 'Images that failed for good and wait for a person.')), list.replayAll),
    list.form, list.element, list.bulk)
  list.load()
}

class DeadLetters {
  constructor(state, signal) {
    this.state = state
    this.leaving = signal
    this.selected = new Map() // ids to rows
    this.replayAll = button('Replay all', { icon: 'replay', onclick: () => this.replayMatching(), disabled: true })
    this.summary = h('p', { class: 'summary', role: 'status' })
    this.rows = h('ul', { class: 'letters' })
    this.foot = h('div', { class: 'foot' })
    this.everything = h('input', { type: 'checkbox', onchange: () => this.selectShown(this.everything.checked) })
    this.top = h('div', { class: 'letters-top' }, h('label', { class: 'check' }, this.everything, h('span', null, 'Select all shown')), this.summary)
    this.element = h('section', { 'aria-label': 'Dead letters' }, this.top, this.rows, this.foot)
    this.bulk = h('div', { class: 'bulk', role: 'region', 'aria-label': 'Selected dead letters', hidden: true })
    this.form = this.makeForm()
  }

  makeForm() {
    let timer
    const later = (control, ms) => {
      this.state[control.name] = control.value.trim()
      clearTimeout(timer)
      timer = setTimeout(() => this.filtered(), ms)
    }
    const input = (name, label, properties) => h('input', { name, value: this.state[name], 'aria-label': label, placeholder: label, autocomplete: 'off', spellcheck: false, oninput: (event) => later(event.target, typingPause), ...properties })
    this.code = input('code', 'Error code')
    return h('form', { class: 'filters always', role: 'search', 'aria-label': 'Filter dead letters', onsubmit: (event) => event.preventDefault() },
      this.code, input('host', 'Host'), input('user_id', 'User ID', { inputMode: 'numeric', class: 'narrow' }),
      h('select', { name: 'since', 'aria-label': 'Failed since', onchange: (event) => later(event.target, 0) },
        spans.map(([value, text]) => h('option', { value, selected: value === this.state.since }, text))))
  }

  filtered() {
    history.replaceState(null, '', '#' + withQuery('/dead-letters', this.state))
    this.load()
  }

  /** The filter as the API has it. "Since" is fixed when the list is read, so that what is replayed is what is shown. */
  parameters() {
    const { since, ...rest } = this.state
    return { ...rest, since: since && new Date(this.readAt - Number(since) * 3600e3).toISOString() }
  }

  isFiltered() {
    return filters.some((name) => this.state[name])
  }

  async load() {
    this.current?.abort()
    this.current = new AbortController()
    this.signal = AbortSignal.any([this.leaving, this.current.signal])
    this.readAt = Date.now()
    this.shown = 0
    this.select([])
    this.top.classList.add('loading')
    fill(this.summary, 'Loading…')
    fill(this.foot)
    fill(this.rows, skeletons(5, 'letter').map((bone) => h('li', null, bone)))
    await this.page(null)
  }

  async page(cursor) {
    const { signal } = this
    try {
      const { data } = await get(withQuery('/dead-letters', { ...this.parameters(), limit: pageSize, cursor }), signal)
      if (!cursor) fill(this.rows)
      this.show(data, cursor !== null)
    } catch (problem) {
      if (signal.aborted) return
      if (!cursor) fill(this.rows)
      this.fail(problem, cursor)
    }
  }

  fail(problem, cursor) {
    fill(this.summary)
    this.replayAll.disabled = true
    this.form.hidden = problem.status === 403
    if (problem.errors?.length) fill(this.foot, emptyState({ icon: 'filter', title: 'This filter cannot be used', text: problem.errors.map(({ field, detail }) => `${field} ${detail}`).join('; ') + '.' }))
    else fill(this.foot, failure(problem, () => cursor ? this.page(cursor) : this.load()))
  }

  show({ items, next_cursor: next }, isMore) {
    const rows = items.map((letter) => new LetterRow(letter, this))
    this.rows.append(...rows.map((row) => row.element))
    this.shown += items.length
    this.top.classList.toggle('loading', this.shown === 0)
    this.replayAll.disabled = this.shown === 0
    this.replayAll.querySelector('span').textContent = this.isFiltered() ? 'Replay all that match' : 'Replay all'
    fill(this.summary, this.shown > 0 && `${plural(this.shown, 'dead letter')}${next ? ', and there are more' : ''}`)
    if (!this.shown) fill(this.foot, this.nothing())
    else fill(this.foot, next && button('Show more', { onclick: (event) => { event.currentTarget.disabled = true; this.page(next) } }))
    if (isMore) rows[0]?.check.focus()
  }

  nothing() {
    if (this.isFiltered()) return emptyState({ icon: 'search', title: 'No dead letter matches', text: 'Nothing that failed has all of these.' })
    return emptyState({ icon: 'check', title: 'No dead letters', text: 'Every image is ready or still being tried.' })
  }

  // What is selected.

  select(rows) {
    for (const row of this.selected.values()) row.mark(false)
    this.selected.clear()
    for (const row of rows) {
      this.selected.set(row.letter.id, row)
      row.mark(true)
    }
    this.drawBulk()
  }

  toggle(row, on) {
    if (on) this.selected.set(row.letter.id, row)
    else this.selected.delete(row.letter.id)
    row.mark(on)
    this.drawBulk()
  }

  selectShown(on) {
    this.select(on ? [...this.rows.children].map((element) => element.row).filter(Boolean) : [])
  }

  drawBulk() {
    const n = this.selected.size
    this.everything.checked = n > 0 && n === this.shown
    this.everything.indeterminate = n > 0 && n < this.shown
    this.bulk.hidden = n === 0
    if (n === 0) return
    const replay = button('Replay', { icon: 'replay', onclick: () => this.each(replay, 'replay') })
    const discard = button('Discard', { icon: 'trash', kind: 'danger', onclick: () => this.each(discard, 'discard') })
    fill(this.bulk, h('span', { class: 'bulk-count', role: 'status' }, `${count(n)} selected`), replay, discard, iconButton('Clear the selection', 'close', { onclick: () => { this.select([]); this.everything.focus() } }))
  }

  // What is done with them.

  async each(control, action) {
    const rows = [...this.selected.values()]
    const what = plural(rows.length, 'dead letter')
    const yes = await confirm(action === 'replay'
      ? { title: `Replay ${what}?`, text: 'Their images are queued anew, with all their attempts before them.', action: 'Replay' }
      : { title: `Discard ${what}?`, text: 'Their images stay failed, and cannot be replayed any more.', action: 'Discard', danger: true })
    if (!yes) return
    await busy(control, async () => {
      const failed = await inTurn(rows, (row) => row.send(action))
      const done = rows.length - failed.length
      if (done) toast(`${plural(done, 'dead letter')} ${action === 'replay' ? 'replayed' : 'discarded'}.`)
      if (failed.length) toast(`${plural(failed.length, 'dead letter')} could not be ${action === 'replay' ? 'replayed' : 'discarded'}: ${failed[0].message}`, 'bad')
      await this.load()
    })
    this.everything.focus()
  }

  async replayMatching() {
    const text = this.isFiltered() ? 'All that match the filter, also those that are not shown yet, are queued anew.' : 'All of them, also those that are not shown yet, are queued anew.'
    if (!await confirm({ title: 'Replay all dead letters?', text, action: 'Replay all' })) return
    await busy(this.replayAll, async () => {
      const { data } = await call('POST', withQuery('/dead-letters/replay', this.parameters()))
      toast(`${plural(data.replayed, 'dead letter')} replayed.`)
    })
    await this.load()
  }

  /** Takes a row away that has been dealt with, and moves the focus to the next. */
  drop(row) {
    const next = row.element.nextElementSibling ?? row.element.previousElementSibling
    this.selected.delete(row.letter.id)
    row.element.remove()
    this.shown--
    this.drawBulk()
    if (!next) {
      this.load()
      return
    }
    fill(this.summary, plural(this.shown, 'dead letter'))
    next.row?.check.focus()
  }

  filterBy(code) {
    this.code.value = this.state.code = code
    this.filtered()
    this.code.focus()
  }
}

// Runs an action over all items, a few at once, and answers the problems.
async function inTurn(items, action) {
  const rest = [...items]
  const problems = []
  await Promise.all(Array.from({ length: atOnce }, async () => {
    for (let item = rest.shift(); item; item = rest.shift()) await action(item).catch((problem) => problems.push(problem))
  }))
  return problems
}

class LetterRow {
  constructor(letter, list) {
    this.letter = letter
    this.list = list
    const name = `dead letter ${letter.id}, ${fileOf(letter.source)}`
    this.check = h('input', { type: 'checkbox', 'aria-label': `Select ${name}`, onchange: () => list.toggle(this, this.check.checked) })
    this.history = h('div', { class: 'history', id: `history-${letter.id}`, hidden: true })
    this.more = iconButton(`History of ${name}`, 'chevron', { 'aria-expanded': 'false', 'aria-controls': this.history.id, onclick: () => this.showHistory() })
    const replay = iconButton(`Replay ${name}`, 'replay', { onclick: () => this.one(replay, 'replay') })
    const discard = iconButton(`Discard ${name}`, 'trash', { onclick: () => this.one(discard, 'discard') })
    this.element = h('li', { class: 'letter' },
      this.check, this.more,
      h('div', { class: 'letter-what' },
        h('a', { class: 'break', href: `#/products/${letter.product_id}` }, h('strong', null, fileOf(letter.source))),
        h('span', { class: 'meta break' }, `${hostOf(letter.source)} · product ${letter.product_id}, image ${letter.position + 1}`)),
      h('div', { class: 'letter-why' },
        h('button', { type: 'button', class: 'code', 'aria-label': `Show only ${letter.error.code}`, title: 'Show only these', onclick: () => list.filterBy(letter.error.code) }, letter.error.code),
        h('span', { class: 'meta break' }, letter.error.detail)),
      h('div', { class: 'letter-when meta' }, h('span', null, plural(letter.attempts, 'try', 'tries')), timeAgo(letter.failed_at)),
      h('div', { class: 'letter-actions' }, replay, discard),
      this.history)
    this.element.row = this
  }

  mark(on) {
    this.check.checked = on
    this.element.classList.toggle('selected', on)
  }

  send(action) {
    const path = `/dead-letters/${this.letter.id}`
    return action === 'replay' ? call('POST', path + '/replay') : call('DELETE', path)
  }

  async one(control, action) {
    if (action === 'discard' && !await confirm({ title: 'Discard this dead letter?', text: `${fileOf(this.letter.source)} stays failed, and cannot be replayed any more.`, action: 'Discard', danger: true })) return
    await busy(control, async () => {
      await this.send(action)
      toast(action === 'replay' ? 'The image is queued anew.' : 'The dead letter is discarded.')
      this.list.drop(this)
    })
  }

  async showHistory() {
    const open = this.history.hidden
    this.history.hidden = !open
    this.more.setAttribute('aria-expanded', String(open))
    if (!open) return
    fill(this.history, skeletons(1, 'line'))
    try {
      const { data } = await get(`/dead-letters/${this.letter.id}`, this.list.signal)
      fill(this.history, this.details(data))
    } catch (problem) {
      if (!this.list.signal.aborted) fill(this.history, h('p', { class: 'error' }, problem.message))
    }
  }

  details(letter) {
    const attempts = letter.history ?? []
    return [
      h('p', null, h('a', { class: 'source break', href: letter.source, target: '_blank', rel: 'noreferrer' }, letter.source, icon('open'))),
      h('ol', { class: 'attempts' }, attempts.map((attempt, n) => h('li', null,
        h('span', { class: 'attempt-number' }, String(n + 1)),
        h('div', null, h('code', null, attempt.error.code), ' ', h('span', { class: 'break' }, attempt.error.detail)),
        h('span', { class: 'meta' }, `${date(attempt.failed_at)}, after ${duration(attempt.duration_ms / 1000)}`)))),
    ]
  }
}
