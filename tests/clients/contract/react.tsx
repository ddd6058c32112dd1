import { useState, useEffect } from 'react';
function WorkspaceStatus({ workspaceId }: { workspaceId: string }) {
const [status, setStatus] = useState<string>('loading');
useEffect(() => {
const ws = new WebSocket(`ws://localhost:3100/agent/ws`);
ws.onopen = () => {
ws.send(JSON.stringify({
type: 'subscribe',
workspaceId
}));
};
ws.onmessage = (event) => {
const msg = JSON.parse(event.data);
if (msg.type === 'status') {
setStatus(msg.data.status);
}
};
return () => ws.close();
}, [workspaceId]);
return <span>Status: {status}</span>;
}
