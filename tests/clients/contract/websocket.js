const ws = new WebSocket('ws://localhost:3100/agent/ws');
ws.onopen = () => {
ws.send(JSON.stringify({
type: 'subscribe',
workspaceId: 'ws-abc123'
}));
};
ws.onmessage = (event) => {
const message = JSON.parse(event.data);
console.log('Event:', message.type, message.data);
};
