// Small plots over time, drawn as SVG by hand. The drawing is stretched to its
// place, so everything that must keep its form, texts above all, is HTML.

import { h, svg, fill } from './dom.js'

const width = 600
const height = 100

/**
 * A card with a plot. draw(points) takes [{at, values}], where values has a number
 * or null (nothing known) for each series. unit writes a value. top is the least
 * that the axis reaches to.
 */
export class Chart {
  constructor({ title, note, series, unit, top }) {
    Object.assign(this, { title, series, unit, top })
    this.now = h('span', { class: 'chart-now' }, '–')
    this.side = h('span', { class: 'chart-side' })
    this.plot = svg('svg', { class: 'plot', viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: 'none', role: 'img' })
    this.most = h('span', { class: 'axis-top', 'aria-hidden': 'true' })
    this.from = h('span')
    this.tip = h('div', { class: 'tip', hidden: true, 'aria-hidden': 'true' })
    this.stage = h('div', { class: 'plot-stage', onpointermove: (event) => this.point(event), onpointerleave: () => this.unpoint() }, this.plot, this.most, this.tip)
    this.element = h('article', { class: 'chart' },
      h('header', null, h('h2', null, title), note && h('p', { class: 'meta' }, note)),
      h('p', { class: 'chart-figures' }, this.now, this.side),
      this.stage,
      h('p', { class: 'axis', 'aria-hidden': 'true' }, this.from, h('span', null, 'now')),
      series.length > 1 && h('p', { class: 'legend', 'aria-hidden': 'true' }, series.map(({ name, kind }) => h('span', { class: kind }, name))))
  }

  draw(points, { now, side = '' }) {
    this.points = points
    this.now.textContent = now
    this.side.textContent = side
    const known = points.flatMap(({ values }) => values.filter((value) => value !== null))
    this.max = nice(Math.max(this.top, ...known))
    this.most.textContent = this.unit(this.max)
    this.from.textContent = points.length > 1 ? span(points[0].at, points.at(-1).at) : ''
    // The first series lies on top. Failures that there are none of are no red line.
    const lines = this.series.map(({ kind }, n) => this.line(kind, points.map(({ values }) => values[n]))).reverse()
    fill(this.plot, grid(), lines)
    this.plot.setAttribute('aria-label', `${this.title}: ${now}${side ? ', ' + side : ''}. Highest in the time shown: ${known.length ? this.unit(Math.max(...known)) : 'nothing known'}.`)
  }

  x(n) {
    return this.points.length > 1 ? n / (this.points.length - 1) * width : width
  }

  y(value) {
    return height - value / this.max * (height - 4) - 1
  }

  // A line breaks where nothing is known. A single point is a short stroke.
  line(kind, values) {
    if (kind === 'bad' && !values.some((value) => value > 0)) return []
    const runs = []
    values.forEach((value, n) => {
      if (value === null) return
      if (n === 0 || values[n - 1] === null) runs.push([])
      runs.at(-1).push([this.x(n), this.y(value)])
    })
    return runs.map((run) => {
      if (run.length === 1) run.unshift([Math.max(0, run[0][0] - 4), run[0][1]])
      const path = run.map(([x, y], n) => `${n ? 'L' : 'M'}${x.toFixed(1)} ${y.toFixed(1)}`).join('')
      const area = `${path}L${run.at(-1)[0].toFixed(1)} ${height}L${run[0][0].toFixed(1)} ${height}Z`
      return [run.length > 2 && svg('path', { class: `area ${kind}`, d: area }), svg('path', { class: `line ${kind}`, d: path })]
    }).flat()
  }

  point(event) {
    if (!this.points?.length) return
    const box = this.stage.getBoundingClientRect()
    const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width))
    const { at, values } = this.points[Math.round(share * (this.points.length - 1))]
    fill(this.tip, h('strong', null, new Date(at).toLocaleTimeString()), this.series.map(({ name }, n) => h('span', null, `${name} ${values[n] === null ? 'unknown' : this.unit(values[n])}`)))
    this.tip.hidden = false
    this.stage.style.setProperty('--at', `${share * 100}%`)
    this.stage.classList.add('pointed')
    this.tip.classList.toggle('left', share > 0.6)
  }

  unpoint() {
    this.tip.hidden = true
    this.stage.classList.remove('pointed')
  }
}

function grid() {
  return [0.25, 0.5, 0.75].map((share) => svg('line', { class: 'gridline', x1: 0, x2: width, y1: height * share, y2: height * share }))
}

/** The next number of the form 1, 2, 5 × 10ⁿ. */
function nice(value) {
  if (value <= 0) return 1
  const power = 10 ** Math.floor(Math.log10(value))
  return [1, 2, 5, 10].find((step) => step * power >= value * 0.999) * power
}

function span(from, to) {
  const seconds = (new Date(to) - new Date(from)) / 1000
  return seconds < 90 ? `${Math.round(seconds)} s ago` : `${Math.round(seconds / 60)} min ago`
}
