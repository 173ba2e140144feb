// An image of a product, and how it becomes ready while one looks on.

import { h, icon } from './dom.js'
import { events, get } from './api.js'
import { pill } from './ui.js'

/** The image as stored by this service, or what is in its place. */
export function picture(image, { lazy = true, alt = '' } = {}) {
  if (!image) return placeholder('image', 'none', 'No images')
  if (image.status === 'failed') return placeholder('broken', 'bad', 'Failed')
  if (!image.url) return placeholder('image', 'busy', 'In work')
  const element = h('img', { src: image.url, alt, loading: lazy ? 'lazy' : 'eager', decoding: 'async', width: image.width, height: image.height })
  element.addEventListener('error', () => element.replaceWith(placeholder('broken', 'bad', 'Not reachable')), { once: true })
  return element
}

function placeholder(name, kind, text) {
  return h('span', { class: `placeholder ${kind}` }, icon(name), h('span', null, text))
}

/** The status of one image as a pill. */
export function imagePill(image) {
  if (image.status === 'ready') return pill('ok', 'Ready')
  if (image.status === 'failed') return pill('bad', 'Failed')
  return pill('busy', image.attempts ? `Waits for try ${image.attempts + 1}` : 'In work')
}

/** How many images of a product are in which status. */
export function tally(product) {
  const of = (status) => product.images.filter((image) => image.status === status).length
  return { ready: of('ready'), pending: of('pending'), failed: of('failed') }
}

// A browser has six connections for a service that speaks HTTP/1.1. The streams
// leave three of them for everything else.
const maxStreams = 3
const retryPause = 2000

let open = 0
const waiting = []

/**
 * Follows a product until none of its images is pending. changed is called with
 * the product each time that an image has changed, and at the end with the
 * product read anew. The stream is opened again if it breaks.
 */
export async function follow(product, changed, signal) {
  await turn(signal)
  try {
    while (!signal.aborted && product && tally(product).pending > 0) product = await followOnce(product, changed, signal)
  } finally {
    open--
    waiting.shift()?.()
  }
}

function turn(signal) {
  if (open < maxStreams) {
    open++
    return undefined
  }
  return new Promise((resolve) => {
    const go = () => {
      signal.removeEventListener('abort', drop)
      open++
      resolve()
    }
    const drop = () => { // a view that is left gives its place in the line up
      waiting.splice(waiting.indexOf(go), 1)
      go()
    }
    signal.addEventListener('abort', drop, { once: true })
    waiting.push(go)
  })
}

async function followOnce(product, changed, signal) {
  const images = [...product.images]
  try {
    await events(`/products/${product.id}/events`, (name, data) => {
      if (name !== 'image') return
      const { position, ...image } = data
      images[position] = image
      changed({ ...product, images: [...images] })
    }, signal)
  } catch {
    await pause(retryPause, signal)
  }
  if (signal.aborted) return null
  try {
    const { data } = await get(`/products/${product.id}`, signal)
    changed(data)
    return data
  } catch (problem) {
    if (problem.status === 404 || problem.status === 401) return null
    await pause(retryPause, signal)
    return product
  }
}

function pause(ms, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, ms)
    signal.addEventListener('abort', () => {
      clearTimeout(timer)
      resolve()
    }, { once: true })
  })
}
