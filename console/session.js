// The token, the appearance and the health light: what belongs to no view.

import { h, icon } from './dom.js'
import { token, whenUnauthorized, readiness } from './api.js'
import { openDialog, field, setError, button } from './ui.js'

const healthInterval = 15000

let asking = null

/** Asks for a token and calls again when there is one. */
export function watchSession(again) {
  const leave = document.getElementById('leave')
  const show = () => { leave.hidden = !token.get() }
  show()
  leave.addEventListener('click', () => {
    token.forget()
    show()
    again()
  })
  whenUnauthorized((wasSent) => {
    token.forget()
    show()
    asking ??= askForToken(wasSent).then((given) => {
      asking = null
      token.set(given)
      show()
      again()
    })
  })
}

// The dialog cannot be left without a token: there is nothing to see without one.
async function askForToken(refused) {
  const input = h('input', { type: 'password', name: 'token', autocomplete: 'off', spellcheck: false, required: true })
  const form = h('form', {
    method: 'dialog', class: 'form', onsubmit: (event) => {
      event.preventDefault()
      const given = input.value.trim()
      if (given) dialog.close(given)
      else setError(input, 'Paste a token.')
    },
  }, h('p', { class: 'lead' }, 'This service wants a token. It is kept until this tab is closed, and sent to this service only.'),
  field('API token', input, { hint: 'An operator makes one with “pms token create”.' }),
  h('div', { class: 'form-actions' }, h('button', { type: 'submit', class: 'button primary' }, icon('key'), h('span', null, 'Continue'))))
  const { dialog, closed } = openDialog({ title: 'Token needed', kind: 'small gate', content: form, mayClose: () => false })
  if (refused) setError(input, 'That token is not valid.')
  input.focus()
  return closed
}

/** Lets the reader choose between light and dark; at first it is the system's. */
export function watchTheme() {
  const toggle = document.getElementById('theme')
  const system = matchMedia('(prefers-color-scheme: dark)')
  const root = document.documentElement
  const apply = () => {
    const dark = root.dataset.theme ? root.dataset.theme === 'dark' : system.matches
    toggle.setAttribute('aria-pressed', String(dark))
    toggle.replaceChildren(icon(dark ? 'sun' : 'moon'))
  }
  const chosen = localStorage.getItem('pms.theme')
  if (chosen) root.dataset.theme = chosen
  toggle.addEventListener('click', () => {
    root.dataset.theme = toggle.getAttribute('aria-pressed') === 'true' ? 'light' : 'dark'
    localStorage.setItem('pms.theme', root.dataset.theme)
    apply()
  })
  system.addEventListener('change', apply)
  apply()
}

const healthTexts = { ready: 'All parts work', degraded: 'Degraded', unavailable: 'Unavailable', stopping: 'Stopping', unreachable: 'Unreachable' }

/** Keeps the health light true while the page is looked at. */
export function watchHealth() {
  const light = document.getElementById('health')
  const look = async () => {
    if (document.hidden) return
    const state = await readiness().then((ready) => ready.status, () => 'unreachable')
    light.dataset.state = state
    light.querySelector('.health-text').textContent = healthTexts[state] ?? state
    light.setAttribute('aria-label', `Service: ${healthTexts[state] ?? state}`)
  }
  look()
  setInterval(look, healthInterval)
  document.addEventListener('visibilitychange', look)
}
