// How values are written. The locale is the reader's.

const prices = new Intl.NumberFormat(undefined, { minimumFractionDigits: 2, maximumFractionDigits: 2 })
const numbers = new Intl.NumberFormat()
const dates = new Intl.DateTimeFormat(undefined, { dateStyle: 'medium', timeStyle: 'medium' })
const relative = new Intl.RelativeTimeFormat(undefined, { numeric: 'auto', style: 'short' })

/** A price. The API knows no currency, so none is shown. */
export const price = (value) => prices.format(value)

export const count = (value) => numbers.format(value)

/** "1 image", "2 images". */
export const plural = (n, one, many = one + 's') => `${count(n)} ${n === 1 ? one : many}`

/** Bytes, to three digits. */
export function bytes(n) {
  let unit = 0
  while (n >= 1000 && unit < 4) {
    n /= 1000
    unit++
  }
  const digits = unit === 0 || n >= 100 ? 0 : n >= 10 ? 1 : 2
  return `${n.toLocaleString(undefined, { minimumFractionDigits: digits, maximumFractionDigits: digits })} ${['B', 'kB', 'MB', 'GB', 'TB'][unit]}`
}

/** How much smaller b is than a, in whole percent. */
export function saved(a, b) {
  return a > 0 ? Math.round((1 - b / a) * 100) : 0
}

/** A duration in seconds, to the unit that says most. */
export function duration(seconds) {
  if (seconds === 0) return '0 s'
  if (seconds < 0.001) return `${Math.round(seconds * 1e6)} µs`
  if (seconds < 1) return `${+(seconds * 1000).toPrecision(3)} ms`
  if (seconds < 10) return `${+seconds.toPrecision(2)} s`
  if (seconds < 60) return `${Math.round(seconds)} s`
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min`
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`
  return plural(Math.floor(seconds / 86400), 'day')
}

const steps = [[60, 'second', 1], [3600, 'minute', 60], [86400, 'hour', 3600], [30 * 86400, 'day', 86400], [365 * 86400, 'month', 30 * 86400], [Infinity, 'year', 365 * 86400]]

/** How long ago a time was. */
export function ago(time, now = Date.now()) {
  const seconds = (now - new Date(time).getTime()) / 1000
  if (seconds < 5) return 'just now'
  const [, unit, size] = steps.find(([limit]) => seconds < limit)
  return relative.format(-Math.floor(seconds / size), unit)
}

export const date = (time) => dates.format(new Date(time))

/** The host of a URL, and the last part of its path. */
export function hostOf(url) {
  try {
    return new URL(url).host
  } catch {
    return url
  }
}

/** The host as the URL has it, by which the API finds dead letters: a browser would
 * write bücher.example, 127.1 and other forms anew. */
export const writtenHostOf = (url) => /^https?:\/\/([^/?#]*)/i.exec(url)?.[1] ?? ''

export function fileOf(url) {
  try {
    const last = new URL(url).pathname.split('/').filter(Boolean).pop()
    return last ? decodeURIComponent(last) : new URL(url).host
  } catch {
    return url
  }
}
