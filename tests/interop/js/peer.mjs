// A program that puts @chainsafe/libp2p-yamux behind the commands that ../README.md lists.
//
// Its muxer wants a libp2p connection; `SocketConnection` makes one of a plain TCP socket.

import { createHash } from 'node:crypto'
import net from 'node:net'
import { createInterface } from 'node:readline'
import { parseArgs } from 'node:util'

import { yamux } from '@chainsafe/libp2p-yamux'
import { AbstractMultiaddrConnection } from '@libp2p/utils'

const PATTERN_PERIOD = 65521
const CHUNK = 65536

const PATTERN = makePattern()

// libp2p calls this at run time, and Node has it from 22 on only.
Promise.withResolvers ??= () => {
  let resolve, reject
  const promise = new Promise((...both) => { [resolve, reject] = both })
  return { promise, resolve, reject }
}

function makePattern () {
  const block = Buffer.alloc(PATTERN_PERIOD)
  let x = 1
  for (let i = 0; i < PATTERN_PERIOD; i++) {
    x = (Math.imul(x, 1664525) + 1013904223) >>> 0
    block[i] = x >>> 24
  }
  return block
}

function patternPiece (offset, size) {
  const piece = Buffer.alloc(size)
  for (let filled = 0; filled < size;) {
    filled += PATTERN.copy(piece, filled, (offset + filled) % PATTERN_PERIOD)
  }
  return piece
}

// --- the connection ---

function makeLog () {
  const log = () => {}
  log.trace = () => {}
  log.error = (format, ...words) => {
    // Each reset that a job asks for is logged with its stack; the tests want to see the rest.
    if (!format.startsWith('abort with error')) {
      console.error(format, ...words)
    }
  }
  log.newScope = makeLog
  return log
}

class SocketConnection extends AbstractMultiaddrConnection {
  constructor (socket, direction) {
    super({ log: makeLog(), direction, remoteAddr: undefined })
    this.socket = socket
    socket.on('data', data => this.onData(data))
    socket.on('drain', () => this.safeDispatchEvent('drain'))
    socket.on('end', () => this.onTransportClosed())
    socket.on('close', () => this.onTransportClosed())
    // 'close' follows, and ends the session.
    socket.on('error', error => console.error('socket: %s', error.message))
  }

  sendData (data) {
    let canSendMore = true
    for (const part of data) {
      canSendMore = this.socket.write(part)
    }
    return { sentBytes: data.byteLength, canSendMore }
  }

  sendReset () {
    this.socket.destroy()
  }

  async sendClose () {
    this.socket.end()
  }

  sendPause () {
    this.socket.pause()
  }

  sendResume () {
    this.socket.resume()
  }
}

// --- a stream, as bytes to wait for ---

class StreamReader {
  constructor (stream) {
    this.pieces = []
    this.end = undefined
    this.wake = () => {}
    stream.addEventListener('message', event => {
      this.pieces.push(Buffer.from(event.data.subarray()))
      this.wake()
    })
    stream.addEventListener('remoteCloseWrite', () => this.finish('eof'))
    stream.addEventListener('close', ({ error }) => {
      if (error == null) {
        this.finish('eof')
      } else {
        this.finish(error.name === 'StreamResetError' ? 'reset' : `error: ${error}`)
      }
    })
  }

  finish (end) {
    // A reset after the end of the data is no news to a reader.
    this.end ??= end
    this.wake()
  }

  // Resolve with at most `limit` bytes, or with null at the end, which `this.end` then names.
  async read (limit = Infinity) {
    while (this.pieces.length === 0 && this.end === undefined) {
      await new Promise(resolve => { this.wake = resolve })
    }
    const piece = this.pieces.shift()
    if (piece === undefined) {
      return null
    }
    if (piece.length > limit) {
      this.pieces.unshift(piece.subarray(limit))
      return piece.subarray(0, limit)
    }
    return piece
  }

  async readLine () {
    let line = ''
    for (;;) {
      const piece = await this.read()
      if (piece === null) {
        return null
      }
      const newline = piece.indexOf(0x0a)
      if (newline >= 0) {
        if (newline + 1 < piece.length) {
          this.pieces.unshift(piece.subarray(newline + 1))
        }
        return line + piece.toString('latin1', 0, newline)
      }
      line += piece.toString('latin1')
    }
  }
}

class Tally {
  constructor (verb = '') {
    this.verb = verb
    this.sent = 0
    this.received = 0
    this.digest = createHash('sha256')
    this.end = 'eof'
  }

  take (data) {
    this.received += data.length
    this.digest.update(data)
  }

  outcome ({ read = true } = {}) {
    const { verb, sent, received, end } = this
    return { verb, sent, received, sha256: read ? this.digest.digest('hex') : '', end }
  }
}

async function write (stream, data) {
  if (!stream.send(data)) {
    await stream.onDrain()
  }
}

async function writePattern (stream, tally, size, seed, chunk = CHUNK) {
  for (let position = 0; position < size; position += chunk) {
    const piece = patternPiece(seed + position, Math.min(chunk, size - position))
    await write(stream, piece)
    tally.sent += piece.length
  }
}

// --- streams that this side opens ---

function requestLine (job) {
  switch (job.verb) {
    case 'echo':
    case 'digest':
      return `${job.verb} ${job.half ? '*' : job.size}\n`
    case 'source':
      return `source ${job.size} ${job.seed}\n`
    case 'reset':
      return `reset ${job.size}\n`
    case 'abandon':
      return 'abandon\n'
    default:
      return 'drain\n'
  }
}

async function run (muxer, job) {
  const tally = new Tally(job.verb)
  let stream
  try {
    stream = await muxer.createStream()
  } catch (error) {
    tally.end = `error: ${error.message}`
    return tally.outcome()
  }
  const reader = new StreamReader(stream)
  const written = writeRequest(stream, reader, job, tally)
  if (['push', 'abandon', 'desert', 'hold'].includes(job.verb)) {
    await written
    tally.end = 'done'
    if (job.verb === 'push') {
      await stream.close()
    } else if (job.verb !== 'hold') {
      stream.abort(new Error('abandoned'))
    }
    return tally.outcome({ read: false })
  }
  for (let data; (data = await reader.read()) !== null;) {
    tally.take(data)
  }
  tally.end = reader.end
  await written
  await stream.close()
  return tally.outcome()
}

async function writeRequest (stream, reader, job, tally) {
  try {
    await write(stream, Buffer.from(requestLine(job)))
    if (job.verb === 'abandon') {
      await reader.read()
    }
    await writePattern(stream, tally, job.verb === 'source' ? 0 : job.size, job.seed, job.chunk)
    if (job.half) {
      await stream.close()
    }
  } catch (error) {
    // A write fails because the stream has ended, which its reader reports.
    if (stream.status === 'open') {
      throw error
    }
  }
}

// --- streams that the other side opens ---

async function serve (stream) {
  const tally = new Tally()
  const reader = new StreamReader(stream)
  try {
    const line = await reader.readLine()
    if (line !== null) {
      const words = line.split(' ')
      tally.verb = words[0]
      await serveVerb(stream, reader, tally, words)
    }
    tally.end = reader.end ?? 'eof'
    await stream.close()
  } catch (error) {
    tally.end = reader.end === 'reset' ? 'reset' : `error: ${error.message}`
  }
  return tally.outcome()
}

async function serveVerb (stream, reader, tally, words) {
  if (tally.verb === 'abandon') {
    await write(stream, Buffer.from('+'))
  }
  const sized = words.length > 1 && words[1] !== '*'
  let left = sized ? Number(words[1]) : Infinity
  if (tally.verb === 'source') {
    await writePattern(stream, tally, left, Number(words[2]))
    return
  }
  while (left > 0) {
    const data = await reader.read(left)
    if (data === null) {
      break
    }
    left -= data.length
    tally.take(data)
    if (tally.verb === 'echo') {
      await write(stream, data)
      tally.sent += data.length
    }
  }
  if (tally.verb === 'digest') {
    const answer = Buffer.from(`${tally.received} ${tally.digest.copy().digest('hex')}\n`)
    await write(stream, answer)
    tally.sent = answer.length
  } else if (tally.verb === 'reset') {
    // All was read; the reader shall not take the end that this makes for the other side's.
    reader.finish('eof')
    stream.abort(new Error('reset on request'))
  }
}

// --- commands ---

class Program {
  constructor (muxer) {
    this.muxer = muxer
    this.served = []
    this.servedMore = () => {}
    // Streams of "hold" jobs are kept by the muxer itself.
    this.commands = {
      run: async ({ jobs, at_once: atOnce }) => ({ outcomes: await this.runAll(jobs, atOnce) }),
      served: async ({ count }) => ({ outcomes: await this.takeServed(count) }),
      ping: async ({ count }) => ({ rtts: await this.ping(count) }),
      streams: async () => ({ count: muxer.streams.length }),
      close: async () => { await muxer.close(); await muxer.maConn.close(); return {} },
      ended: async () => { await this.ended; return {} }
    }
    muxer.addEventListener('stream', event => this.serveOne(event.detail))
    this.ended = new Promise(resolve => muxer.maConn.addEventListener('close', () => resolve()))
  }

  async serveOne (stream) {
    this.served.push(await serve(stream))
    this.servedMore()
  }

  async obey ({ id, do: name, ...words }) {
    try {
      reply({ id, ...await this.commands[name](words) })
    } catch (error) {
      reply({ id, error: String(error) })
    }
  }

  async runAll (jobs, atOnce) {
    const outcomes = new Array(jobs.length)
    let next = 0
    const worker = async () => {
      for (let number; (number = next++) < jobs.length;) {
        outcomes[number] = await run(this.muxer, jobs[number])
      }
    }
    await Promise.all(Array.from({ length: atOnce }, worker))
    return outcomes
  }

  async takeServed (count) {
    while (this.served.length < count) {
      await new Promise(resolve => { this.servedMore = resolve })
    }
    return this.served.splice(0)
  }

  async ping (count) {
    const rtts = []
    while (rtts.length < count) {
      rtts.push(await this.muxer.ping() / 1000)
    }
    return rtts
  }
}

function reply (message) {
  process.stdout.write(JSON.stringify(message) + '\n')
}

function connect ({ dial }) {
  return new Promise((resolve, reject) => {
    if (dial !== undefined) {
      const [host, port] = dial.split(':')
      const socket = net.connect({ host, port: Number(port), noDelay: true }, () => resolve(socket))
      socket.once('error', reject)
      return
    }
    const listener = net.createServer({ noDelay: true }, socket => {
      listener.close()
      resolve(socket)
    })
    listener.listen(0, '127.0.0.1', () => reply({ event: 'listening', port: listener.address().port }))
  })
}

async function main () {
  // One dash before the options, as the other peers have it.
  const args = process.argv.slice(2).map(word => word.replace(/^-(?=[a-z]{2})/, '--'))
  const { values } = parseArgs({ args, options: { listen: { type: 'boolean' }, dial: { type: 'string' } } })
  const socket = await connect(values)
  const connection = new SocketConnection(socket, values.dial === undefined ? 'inbound' : 'outbound')
  const program = new Program(yamux()().createStreamMuxer(connection))
  reply({ event: 'connected' })
  for await (const line of createInterface({ input: process.stdin })) {
    program.obey(JSON.parse(line))
  }
  process.exit(0)
}

await main()
