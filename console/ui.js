// What all views share: dialogs, toasts, and the states a view can be in.

import { h, icon, fill, freshID } from './dom.js'
import { ago, date } from './format.js'

/** A button with an icon and a text. */
export function button(text, { icon: name, kind = '', ...properties } = {}) {
  return h('button', { type: 'button', ...properties, class: `button ${kind}` }, name && icon(name), h('span', null, text))
}

/** A button that shows an icon alone; label is its name. */
export function iconButton(label, name, properties = {}) {
  return h('button', { type: 'button', title: label, 'aria-label': label, ...properties, class: `button quiet square ${properties.class ?? ''}` }, icon(name))
}

/** A status as a pill. Its kind is one of ok, busy, bad, plain. */
export function pill(kind, text) {
  return h('span', { class: `pill ${kind}` }, h('span', { class: 'dot', 'aria-hidden': 'true' }), text)
}

/** A time, as how long ago it was; the whole of it is its title. */
export function timeAgo(time) {
  return h('time', { dateTime: time, title: date(time) }, ago(time))
}

/** Says in passing how something went. */
export function toast(text, kind = 'ok') {
  const box = h('div', { class: `toast ${kind}` }, icon(kind === 'ok' ? 'check' : 'alert'), h('span', null, text))
  const toasts = document.getElementById('toasts')
  toasts.append(box)
  while (toasts.childElementCount > 3) toasts.firstElementChild.remove()
  setTimeout(() => box.remove(), kind === 'ok' ? 4000 : 8000)
}

/** A place that is empty, or could not be filled. */
export function emptyState({ icon: name, title, text, action }) {
  return h('div', { class: 'empty' }, h('div', { class: 'empty-icon' }, icon(name)), h('h2', null, title), text && h('p', null, text), action)
}

/** What a view shows that could not be loaded. */
export function failure(problem, retry) {
  if (problem.status === 403) {
    return emptyState({ icon: 'key', title: 'This needs an admin’s token', text: 'The token in use may read products and change those of its user.' })
  }
  if (problem.status === 401) return emptyState({ icon: 'key', title: 'A token is needed' })
  const detail = problem.requestID ? `${problem.message} (request ${problem.requestID})` : problem.message
  return h('div', { class: 'empty', role: 'alert' }, h('div', { class: 'empty-icon bad' }, icon('alert')), h('h2', null, 'This could not be loaded'),
    h('p', null, detail), retry && button('Try again', { icon: 'replay', onclick: retry }))
}

export function skeletons(n, kind) {
  return Array.from({ length: n }, () => h('div', { class: `skeleton ${kind}`, 'aria-hidden': 'true' }))
}

/**
 * Opens a dialog and answers {dialog, closed}. The focus goes back where it was.
 * mayClose is asked before Escape or the close button close it.
 */
export function openDialog({ title, kind = '', content, actions, mayClose = () => true }) {
  const heading = freshID('dialog')
  const close = async () => (await mayClose()) && dialog.close()
  const before = document.activeElement
  const dialog = h('dialog', { class: kind, 'aria-labelledby': heading },
    h('header', null, h('h2', { id: heading }, title), iconButton('Close', 'close', { onclick: close })),
    h('div', { class: 'dialog-body' }, content),
    actions && h('footer', null, actions))
  dialog.addEventListener('cancel', (event) => {
    event.preventDefault()
    close()
  })
  const closed = new Promise((resolve) => dialog.addEventListener('close', () => {
    dialog.remove()
    before?.focus?.()
    resolve(dialog.returnValue)
  }, { once: true }))
  document.body.append(dialog)
  dialog.showModal()
  return { dialog, closed }
}

/** Asks before something that cannot be taken back. Answers whether to do it. */
export async function confirm({ title, text, action, danger = false }) {
  const yes = button(action, { kind: danger ? 'danger' : 'primary', onclick: () => dialog.close('yes') })
  const no = button('Cancel', { onclick: () => dialog.close() })
  const { dialog, closed } = openDialog({ title, kind: 'small', content: h('p', null, text), actions: [no, yes] })
  ;(danger ? no : yes).focus()
  return (await closed) === 'yes'
}

/** Runs an action with its button at rest meanwhile, and says if it failed. */
export async function busy(control, action) {
  control.disabled = true
  control.setAttribute('aria-busy', 'true')
  try {
    return await action()
  } catch (problem) {
    if (problem.name === 'AbortError') return undefined
    toast(problem.message, 'bad')
    return undefined
  } finally {
    control.disabled = false
    control.removeAttribute('aria-busy')
  }
}

/** A form field with its label, and a place for its error. */
export function field(label, control, { hint, wide } = {}) {
  control.id ||= freshID('field')
  const error = h('p', { class: 'error', id: control.id + '-error', hidden: true })
  const note = hint && h('p', { class: 'hint', id: control.id + '-hint' }, hint)
  control.setAttribute('aria-describedby', [note?.id, error.id].filter(Boolean).join(' '))
  return h('div', { class: wide ? 'field wide' : 'field' }, h('label', { htmlFor: control.id }, label), control, note, error)
}

/** Shows an error at a control made by field, or takes it away. */
export function setError(control, text) {
  const error = document.getElementById(control.id + '-error')
  fill(error, text)
  error.hidden = !text
  if (text) control.setAttribute('aria-invalid', 'true')
  else control.removeAttribute('aria-invalid')
}
