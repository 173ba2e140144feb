// Before and after, one over the other, with a divider that is dragged.

import { h, icon } from './dom.js'
import { bytes, hostOf } from './format.js'
import { button } from './ui.js'
import { picture } from './images.js'

// The hosts from which the reader has allowed originals to be loaded. Loading one
// tells its host that somebody looks, and from where, so it takes a press of a
// button; it is asked once a host, until the page is left.
const allowed = new Set()

/** Shows a ready image, and on demand its original beside it. */
export function comparison(image, label) {
  const box = h('div', { class: 'compare' })
  box.style.setProperty('--ratio', `${image.width} / ${image.height}`)
  const after = h('div', { class: 'compare-after' }, picture(image, { lazy: false, alt: label }))
  const host = hostOf(image.source)
  const offer = h('div', { class: 'compare-offer' },
    button('Compare with the original', { icon: 'compare', onclick: () => { allowed.add(host); showBoth(box, image, after) } }),
    h('p', null, `Loads it from ${host}, which will see your address.`))
  box.append(after)
  if (allowed.has(host)) showBoth(box, image, after)
  else box.append(offer)
  return box
}

function showBoth(box, image, after) {
  const before = h('img', { class: 'compare-before', src: image.source, alt: 'The original', referrerPolicy: 'no-referrer', decoding: 'async' })
  const slider = h('input', { type: 'range', min: 0, max: 100, step: 1, value: 50, class: 'compare-slider', 'aria-label': 'Divider between original and stored image' })
  const place = () => {
    box.style.setProperty('--split', `${slider.value}%`)
    slider.setAttribute('aria-valuetext', `${slider.value} % original`)
  }
  slider.addEventListener('input', place)
  before.addEventListener('error', () => box.replaceChildren(after, notLoaded(image)), { once: true })
  box.replaceChildren(after, before,
    h('span', { class: 'compare-label left' }, `Original · ${bytes(image.source_bytes)}`),
    h('span', { class: 'compare-label right' }, `Stored · ${bytes(image.bytes)}`),
    h('span', { class: 'compare-handle', 'aria-hidden': 'true' }, icon('compare')), slider)
  place()
  slider.focus({ preventScroll: true })
}

function notLoaded(image) {
  return h('div', { class: 'compare-offer', role: 'status' }, h('p', null, `The original could not be loaded from ${hostOf(image.source)}.`),
    h('a', { class: 'button', href: image.source, target: '_blank', rel: 'noreferrer' }, icon('open'), h('span', null, 'Open it in a tab')))
}
