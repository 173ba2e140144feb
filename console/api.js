// The API, as anybody else would use it.

const tokenKey = 'pms.token'

/** The token lives as long as the tab, and is never part of a URL. */
export const token = {
  get: () => sessionStorage.getItem(tokenKey) ?? '',
  set: (value) => sessionStorage.setItem(tokenKey, value),
  forget: () => sessionStorage.removeItem(tokenKey),
}

/** What the API answers instead of what was asked for (RFC 9457). */
export class Problem extends Error {
  constructor(status, body = {}) {
    super(body.detail || body.title || `The service answered ${status}.`)
    this.status = status
    this.errors = body.errors ?? [] // of fields: {field, detail}
    this.requestID = body.request_id
  }
}

let onUnauthorized = () => {}

/** Sets what is to happen when the API wants a token, or another one. */
export function whenUnauthorized(handler) {
  onUnauthorized = handler
}

async function send(method, path, { body, type = 'application/json', headers = {}, signal } = {}) {
  const sent = token.get()
  const all = { ...headers }
  if (sent) all.Authorization = `Bearer ${sent}`
  if (body !== undefined) all['Content-Type'] = type
  let response
  try {
    response = await fetch(path, { method, headers: all, body: body === undefined ? undefined : JSON.stringify(body), signal, cache: 'no-store' })
  } catch (error) {
    if (signal?.aborted) throw error
    throw new Problem(0, { detail: 'The service cannot be reached.' })
  }
  if (response.ok) return response
  const problem = new Problem(response.status, await response.json().catch(() => ({})))
  if (response.status === 401 && sent === token.get()) onUnauthorized(sent !== '')
  throw problem
}

/** Calls the API and answers {data, etag}. It throws a Problem. */
export async function call(method, path, options) {
  const response = await send(method, path, options)
  const text = await response.text()
  return { data: text ? JSON.parse(text) : null, etag: response.headers.get('ETag') }
}

export const get = (path, signal) => call('GET', path, { signal })

/** A path with a query of those parameters that have a value. */
export function withQuery(path, parameters) {
  const query = new URLSearchParams(Object.entries(parameters).filter(([, value]) => value !== '' && value !== null && value !== undefined))
  return query.size ? `${path}?${query}` : path
}

/** GET /readyz, whose 503 has the same body as its 200. */
export async function readiness(signal) {
  const response = await fetch('/readyz', { signal, cache: 'no-store' })
  return response.json()
}

/**
 * Reads a stream of server-sent events (WHATWG HTML, section 9.2), and calls
 * on(name, data) for each. EventSource would do the same, but cannot send a token.
 * It returns when the stream ends.
 */
export async function events(path, on, signal) {
  const response = await send('GET', path, { headers: { Accept: 'text/event-stream' }, signal })
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader()
  let rest = ''
  for (;;) {
    const { done, value } = await reader.read()
    if (done) return
    const blocks = (rest + value).split('\n\n')
    rest = blocks.pop()
    for (const block of blocks) dispatch(block, on)
  }
}

function dispatch(block, on) {
  let name = 'message'
  const data = []
  for (const line of block.split('\n')) {
    const [, field, value] = /^([^:]*):? ?(.*)$/.exec(line)
    if (field === 'event') name = value
    if (field === 'data') data.push(value)
  }
  if (data.length) on(name, JSON.parse(data.join('\n')))
}
