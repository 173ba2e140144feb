// How the service is doing: which part is away and what that means, and the last
// hour as plots.

import { h, fill, icon } from './dom.js'
import { get } from './api.js'
import { count, duration } from './format.js'
import { failure, pill, skeletons } from './ui.js'
import { Chart } from './charts.js'

const refreshInterval = 10000

// What each part is called, and what is still done while it is away.
const parts = {
  store: ['Database', 'No product can be read or written, but those in the cache can be read.'],
  queue: ['Queue', 'Products are accepted and read. Their images wait, and are made when it is back.'],
  blobs: ['Image storage', 'Products are accepted and read. New images wait, and stored ones may not load.'],
  cache: ['Cache', 'Everything works. Reads go to the database and take longer.'],
}

const words = {
  ready: ['ok', 'All parts work.'],
  degraded: ['warn', 'Degraded: a part is away that the service can do without for a while.'],
  unavailable: ['bad', 'Unavailable: a part is away that the service cannot do without.'],
  stopping: ['warn', 'This instance is stopping.'],
}

export function overviewView({ root, signal }) {
  const status = h('section', { class: 'status', 'aria-label': 'Parts', 'aria-live': 'polite' }, skeletons(1, 'status'))
  const plots = h('section', { class: 'charts', 'aria-label': 'The last hour' }, skeletons(6, 'chart'))
  const uptime = h('p', { class: 'lead' })
  root.append(h('header', { class: 'head' }, h('div', null, h('h1', null, 'Overview'), uptime)), status, plots)
  const charts = makeCharts()
  let drawn = ''
  const look = async () => {
    try {
      const { data } = await get('/overview', signal)
      uptime.textContent = `Up for ${duration(data.uptime_seconds)}.`
      const state = JSON.stringify([data.status, data.parts])
      if (state !== drawn) fill(status, statusOf(data)) // else a screen reader would say it again
      if (!plots.contains(charts[0].chart.element)) fill(plots, charts.map(({ chart }) => chart.element))
      drawn = state
      for (const { chart, show } of charts) show(chart, data)
    } catch (problem) {
      if (signal.aborted) return
      drawn = ''
      fill(status, failure(problem, look))
      if (problem.status === 403) fill(plots)
    }
  }
  const regularly = () => { if (!document.hidden) look() }
  const timer = setInterval(regularly, refreshInterval)
  document.addEventListener('visibilitychange', regularly, { signal })
  signal.addEventListener('abort', () => clearInterval(timer), { once: true })
  look()
}

function statusOf({ status, parts: states }) {
  const [kind, text] = words[status] ?? ['bad', status]
  return [
    h('p', { class: `status-line ${kind}` }, icon(kind === 'ok' ? 'check' : 'alert'), h('strong', null, text)),
    h('ul', { class: 'parts' }, Object.entries(states).sort(([a], [b]) => order(a) - order(b)).map(([name, state]) => {
      const [label, without] = parts[name] ?? [name, '']
      const away = state !== 'ok'
      return h('li', { class: away ? 'away' : '' }, h('strong', null, label), pill(away ? 'bad' : 'ok', away ? 'Unavailable' : 'Works'), away && h('p', null, without))
    })),
  ]
}

const order = (name) => Object.keys(parts).indexOf(name)

const percent = (share) => `${+(share * 100).toFixed(1)} %`
const atLeast = (n) => n >= 100000 ? `${count(n)} or more` : count(n)

// Each sample is of the time since the one before; a minute has several.
function perMinute(data, of) {
  const span = Math.max(1, Math.round(60 / data.interval_seconds))
  return data.samples.map((_, n) => {
    const minute = data.samples.slice(Math.max(0, n - span + 1), n + 1)
    return minute.some((sample) => of(sample) === null) ? null : minute.reduce((sum, sample) => sum + of(sample), 0)
  })
}

function points(data, ...series) {
  return data.samples.map(({ at }, n) => ({ at, values: series.map((values) => values[n]) }))
}

const last = (values) => values.findLast((value) => value !== null)
const known = (value, write) => value === undefined ? '–' : write(value)

function makeCharts() {
  return [
    {
      chart: new Chart({ title: 'Images a minute', series: [{ name: 'ready', kind: 'main' }, { name: 'failed', kind: 'bad' }], unit: count, top: 10 }),
      show(chart, data) {
        const ready = perMinute(data, ({ images }) => images && images.ready)
        const failed = perMinute(data, ({ images }) => images && images.failed)
        chart.draw(points(data, ready, failed), { now: known(last(ready), count), side: known(last(failed), (n) => `${count(n)} failed`) })
      },
    }, {
      chart: new Chart({ title: 'Queue', series: [{ name: 'waiting', kind: 'main' }], unit: count, top: 10 }),
      show(chart, data) {
        const pending = data.samples.map(({ images }) => images && images.pending)
        const due = last(data.samples.map(({ images }) => images && images.oldest_due_seconds))
        chart.draw(points(data, pending), { now: known(last(pending), atLeast), side: due > 1 ? `oldest waits for ${duration(due)}` : 'none late' })
      },
    }, {
      chart: new Chart({ title: 'Dead letters', series: [{ name: 'dead', kind: 'bad' }], unit: count, top: 10 }),
      show(chart, data) {
        const dead = data.samples.map(({ images }) => images && images.dead_letters)
        const age = last(data.samples.map(({ images }) => images && images.oldest_dead_letter_seconds))
        chart.draw(points(data, dead), { now: known(last(dead), atLeast), side: age ? `oldest ${duration(age)}` : '' })
      },
    }, {
      chart: new Chart({ title: 'Latency', note: 'this instance', series: [{ name: 'median', kind: 'main' }, { name: '99th percentile', kind: 'soft' }], unit: duration, top: 0.001 }),
      show(chart, data) {
        const at = (name) => data.samples.map(({ http }) => http.requests ? http[name] : null)
        const [p50, p99] = [at('p50_seconds'), at('p99_seconds')]
        chart.draw(points(data, p50, p99), { now: known(last(p50), duration), side: last(p99) === undefined ? 'no requests yet' : `99 % within ${duration(last(p99))}` })
      },
    }, {
      chart: new Chart({ title: 'Cache hits', note: 'this instance', series: [{ name: 'hits', kind: 'main' }], unit: percent, top: 1 }),
      show(chart, data) {
        const ratio = data.samples.map(({ cache }) => cache.hits + cache.misses ? cache.hits / (cache.hits + cache.misses) : null)
        const reads = data.samples.reduce((sum, { cache }) => sum + cache.hits + cache.misses, 0)
        chart.draw(points(data, ratio), { now: known(last(ratio), percent), side: reads ? `${count(reads)} reads` : 'no reads yet' })
      },
    }, {
      chart: new Chart({ title: 'Requests a minute', note: 'this instance', series: [{ name: 'requests', kind: 'main' }, { name: 'failed', kind: 'bad' }], unit: count, top: 10 }),
      show(chart, data) {
        const requests = perMinute(data, ({ http }) => http.requests)
        const failed = perMinute(data, ({ http }) => http.errors)
        chart.draw(points(data, requests, failed), { now: known(last(requests), count), side: `${count(last(failed) ?? 0)} failed` })
      },
    },
  ]
}
